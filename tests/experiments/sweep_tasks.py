"""The toy task in sweeps: it tells what Ray gives a run, or keeps a worker busy for ever."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

from toy_task import ToyTask

from dopr_lightning.data import Demonstrations

SAID = "Ray's share: "


class Shares(ToyTask):
    """Tells the log of its run what Ray has given the process that loads it."""

    def load(self) -> Demonstrations:
        import ray

        if ray.is_initialized():
            print(SAID + json.dumps(ray.get_runtime_context().get_assigned_resources()))
        return super().load()


def shares_in(log: Path) -> list[dict[str, float]]:
    """One for each time that the run loaded its data."""
    lines = log.read_text().splitlines()
    return [json.loads(line.removeprefix(SAID)) for line in lines if line.startswith(SAID)]


class Stuck(ToyTask):
    """The first worker process that loads it comes no further.

    Args:
        first: A file that it makes, so that others do.
    """

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = Path(first)

    def load(self) -> Demonstrations:
        if multiprocessing.parent_process() is not None:
            try:
                self.first.touch(exist_ok=False)
            except FileExistsError:
                return super().load()
            time.sleep(3600)
        return super().load()
