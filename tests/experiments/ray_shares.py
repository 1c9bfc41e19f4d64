"""The toy task, which tells the log of its run what Ray has given the process that loads it."""

from __future__ import annotations

import json
from pathlib import Path

import ray
from toy_task import ToyTask

from dopr_lightning.data import Demonstrations

SAID = "Ray's share: "


class Shares(ToyTask):
    def load(self) -> Demonstrations:
        if ray.is_initialized():
            print(SAID + json.dumps(ray.get_runtime_context().get_assigned_resources()))
        return super().load()


def shares_in(log: Path) -> list[dict[str, float]]:
    """One for each time that the run loaded its data."""
    lines = log.read_text().splitlines()
    return [json.loads(line.removeprefix(SAID)) for line in lines if line.startswith(SAID)]
