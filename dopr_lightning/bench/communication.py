"""How many bytes does a rank hand to collectives? Counted in real processes."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dopr_lightning.bench.measure import WARM_UP, Variant
from dopr_lightning.bench.plan import Planned, observed
from dopr_lightning.bench.workloads import Workload, workloads
from dopr_lightning.preconditioner import ActivationPreconditioner
from dopr_lightning.preconditioner.solvers import Solver


def bytes_per_step(
    workload: Workload, *, ranks: int, solvers: Sequence[Solver], update_every: int
) -> list[tuple[float, list[Planned]]]:
    """Per solver: bytes of one rank and step, averaged over the interval after the warm-up, and what was solved how.

    Args:
        workload: A small model; every rank gets its whole batch.
        ranks: Processes, of one thread each, on this machine.
        solvers: As in the preconditioner.
        update_every: As in the preconditioner.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ranks, folder, workload.name, workload.batch_size, solvers, update_every
        mp.spawn(_worker, args=arguments, nprocs=ranks)
        return pickle.loads((Path(folder) / "result").read_bytes())


def _worker(
    rank: int, ranks: int, folder: str, name: str, batch_size: int, solvers: Sequence[Solver], update_every: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    (workload,) = workloads([name], [batch_size])
    results = [_train(workload, solver, update_every) for solver in solvers]
    if rank == 0:
        (Path(folder) / "result").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _train(workload: Workload, solver: Solver, update_every: int) -> tuple[float, list[Planned]]:
    variant = Variant(
        workload, torch.device("cpu"), None, partial(ActivationPreconditioner, solver=solver, update_every=update_every)
    )
    variant.model = DistributedDataParallel(variant.model)
    preconditioner = variant.preconditioner
    assert isinstance(preconditioner, ActivationPreconditioner)
    (batch,) = workload.batches(1, "cpu")
    for _ in range(update_every * -(-WARM_UP // update_every)):
        variant.step(batch)
    before, planned = preconditioner.bytes_sent, observed(preconditioner)
    for _ in range(update_every):
        variant.step(batch)
    return (preconditioner.bytes_sent - before) / update_every, planned
