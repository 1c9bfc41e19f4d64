"""Processes that train together, as torchrun would start them; what a run returns in each comes back."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

RANKS = 2

Runs = Callable[[Path], dict[str, Callable[[], Any]]]

# Lightning is imported once, in the server from which processes fork.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lightning", "dopr_lightning.training"])


def work(rank: int, port: int, folder: Path, runs: Runs) -> None:
    """One of the processes that torchrun would start."""
    torch.set_num_threads(1)
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in torchrun.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"})
    outcomes: dict[str, Any] = {}
    for name, run in runs(folder).items():
        try:
            outcomes[name] = run()
        except Exception:
            outcomes[name] = RuntimeError(f"rank {rank}: {traceback.format_exc()}")
            break
    torch.save(outcomes, folder / f"{rank}.pt")
    assert not any(isinstance(outcome, Exception) for outcome in outcomes.values())


def start(folder: Path, runs: Runs) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=work, args=(rank, port, folder, runs)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    return processes


def outcomes_of(folder: Path, runs: Runs) -> Callable[[str], list[Any]]:
    """Run them all, one after the other; returns what one of them brought, per process."""
    for process in start(folder, runs):
        process.join()
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]

    def get(name: str) -> list[Any]:
        for outcomes in ranks:
            if isinstance(outcomes[name], RuntimeError):
                raise outcomes[name]
        return [outcomes[name] for outcomes in ranks]

    return get
