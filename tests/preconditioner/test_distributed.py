"""DDP with real processes: equal to one process on the union of the batch, and bit-identical across ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dopr_lightning import ActivationPreconditioner

STEPS = 50


class Net(nn.Module):
    """A convolution, an embedding, linear layers, and a layer that only rank 0 uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 8, 3)
        self.embedding = nn.Embedding(5, 8)
        self.hidden = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.readout = nn.Linear(8, 2)

    def forward(self, x: Tensor, token: Tensor, sometimes: bool) -> Tensor:
        h = torch.tanh(self.conv(x).mean(-1) + self.embedding(token))
        h = torch.tanh(self.hidden(h))
        return self.readout(h + self.sometimes(h) if sometimes else h)


def data(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    rows = 6 + 3 * rank  # ranks see different numbers of rows
    x = torch.randn(rows, 3, 7, generator=generator)
    return x, torch.randint(5, (rows,), generator=generator)


def loss(model: nn.Module, step: int, rank: int, total: int) -> Tensor:
    x, token = data(step, rank)
    return model(x, token, rank == 0).square().sum() / total  # sums, so that uneven ranks are weighted alike


def train(model: nn.Module, losses: list[Callable[[nn.Module, int], Tensor]], world: int) -> None:
    """Steps on the summed gradients of ``losses``, functions of the model and the step."""
    ap = ActivationPreconditioner(model, damping=0.1, update_every=3, ema=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        for function in losses:
            (function(model, step) * world).backward()  # DDP divides by the world size
        ap.step()
        optimizer.step()


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    total = sum(6 + 3 * r for r in range(world))
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    train(model, [lambda m, s: loss(m, s, rank, total)], world)
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ddp_equals_one_process_on_the_union_of_the_batch(world: int, tmp_path: Path) -> None:
    mp.spawn(worker, args=(world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for other in ranks[1:]:
        assert all(torch.equal(ranks[0][name], other[name]) for name in ranks[0])

    total = sum(6 + 3 * r for r in range(world))
    model = Net()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, [lambda m, s, r=r: loss(m, s, r, total) for r in range(world)], 1)
    for name, value in model.state_dict().items():
        moved = (value - start[name]).norm()
        assert moved > 0
        assert (ranks[0][name] - value).norm() <= 1e-5 * value.norm(), name
