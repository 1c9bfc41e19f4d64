"""Processes that train together, as torchrun would start them; what a run returns in each comes back."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2

Runs = Callable[[Path], dict[str, Callable[[], Any]]]

# Everything is imported once, in the server from which processes fork.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dopr_lightning.training", "torch.distributed.fsdp"])


def join_group() -> None:
    """What runs that leave it to nobody else do first. A process whose partner is gone says so soon."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))


def work(rank: int, world: int, port: int, folder: Path, runs: Runs) -> None:
    """One of the processes that torchrun would start."""
    torch.set_num_threads(1)
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
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
    if dist.is_initialized():
        dist.destroy_process_group()
    assert not any(isinstance(outcome, Exception) for outcome in outcomes.values())


def start(folder: Path, runs: Runs, world: int = RANKS) -> list[Any]:
    """Start the processes, which write what their runs returned into ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=work, args=(rank, world, port, folder, runs)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run_all(folder: Path, runs: Runs, world: int = RANKS) -> list[dict[str, Any]]:
    """Run them, one after the other; returns what they brought, process by process. The first failure is raised."""
    for process in start(folder, runs, world):
        process.join()
    ranks: list[dict[str, Any]] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for outcomes in ranks:
        for outcome in outcomes.values():
            if isinstance(outcome, RuntimeError):
                raise outcome
    return ranks


def outcomes_of(folder: Path, runs: Runs) -> Callable[[str], list[Any]]:
    """Run them; returns what one of them brought, per process."""
    ranks = run_all(folder, runs)
    return lambda name: [outcomes[name] for outcomes in ranks]
