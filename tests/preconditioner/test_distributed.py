"""DDP with real processes: equal to one process on the union of the batch, and bit-identical across ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import join_group, run_all
from same import assert_same
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner import distributed

STEPS = 50
WATCHED = 8
"""Steps whose gradients are compared: in every setting a first refresh, later ones, and steps between them."""

WIDTH = 160
"""Of the widest layer: its packed covariance has two panels, of 128 and 32 columns."""

BUCKET_BYTES = 1 << 12
"""So small that the sums of each wide layer travel alone, and those of the narrow ones together."""

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"damping": 0.1, "solver": "exact", "update_every": 3, "ema": 0.5},
    "lowrank": {"damping": 0.1, "solver": "lowrank", "update_every": 3, "max_error": 0.02, "overlap": True},
    "accumulated": {"damping": 0.1, "solver": "auto", "update_every": 2, "bias": True, "max_dim": 40},
}


class Net(nn.Module):
    """A convolution, an embedding, linear layers, a frozen one, and one of its own width that rank 1 never uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 8, 3)
        self.embedding = nn.Embedding(5, 8)
        self.hidden = nn.Linear(8, WIDTH)
        self.sometimes = nn.Linear(WIDTH - 2, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.readout = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, token: Tensor, sometimes: bool) -> Tensor:
        h = torch.tanh(self.conv(x).mean(-1) + self.embedding(token))
        h = torch.tanh(self.hidden(h))
        return self.readout(torch.tanh(self.frozen(h + self.sometimes(h[:, 2:]) if sometimes else h)))


def size(rank: int) -> int:
    return 6 + 3 * rank  # ranks see different numbers of rows


def loss(model: nn.Module, step: int, rank: int, micro: int, total: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    x = torch.randn(size(rank), 3, 7, generator=generator)
    token = torch.randint(5, (size(rank),), generator=generator)
    output = model(x, token, rank != 1 and step % 2 == 0)
    return output.square().sum() / total  # sums, so that uneven ranks are weighted alike


def train(
    model: nn.Module, losses: list[Callable[[nn.Module, int], Tensor]], factor: int, options: dict[str, Any]
) -> tuple[ActivationPreconditioner, list[dict[str, Tensor]]]:
    """Steps on the summed gradients of ``losses``, functions of the model and the step; also the first rewrites."""
    ap = ActivationPreconditioner(model, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rewritten = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for i, function in enumerate(losses):
            parallel = isinstance(model, DistributedDataParallel)
            with model.no_sync() if parallel and i < len(losses) - 1 else nullcontext():
                (function(model, step) * factor).backward()  # DDP divides by the world size
        ap.step()
        if step < WATCHED:
            rewritten.append(gradients(model))
        optimizer.step()
    return ap, rewritten


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def micro_batches(name: str) -> int:
    return 2 if name == "accumulated" else 1


def trained(rank: int, world: int, name: str) -> dict[str, Any]:
    total = sum(size(r) for r in range(world))
    model = DistributedDataParallel(Net(), find_unused_parameters=True)
    losses = [lambda m, s, i=i: loss(m, s, rank, i, total) for i in range(micro_batches(name))]
    ap, rewritten = train(model, losses, world, SETTINGS[name])
    return {
        "weights": model.module.state_dict(),
        "rewritten": rewritten,
        "state": ap.state_dict(),
        "bytes": ap.bytes_sent,
    }


class InFlight:
    """A message in flight; ``log`` is told when somebody waits for it."""

    def __init__(self, work: dist.Work | None, log: list[str | int]) -> None:
        self.work, self.log = work, log

    def wait(self) -> None:
        self.log.append("wait")
        if self.work is not None:
            self.work.wait()


def counted(rank: int, world: int) -> dict[str, Any]:
    """Bytes per step, each message's in order and the waits between them, and the blocks that this rank inverts."""
    log: list[str | int] = []
    inverted = []
    all_reduce, broadcast, cholesky = dist.all_reduce, dist.broadcast, torch.linalg.cholesky_ex

    def watching(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> InFlight:
            log.append(tensor.numel() * tensor.element_size())
            work = InFlight(collective(tensor, *args, async_op=async_op, **kwargs), log)
            if not async_op:
                log.append("wait")
            return work

        return call

    def factorise(matrix: Tensor, **options: Any) -> Any:
        if solver == "exact":
            inverted.append(tuple(matrix.shape[:2]))
        return cholesky(matrix, **options)

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 2))
    model[1].requires_grad_(False)
    outcomes = {}
    for solver in ("exact", "lowrank"):
        ap = ActivationPreconditioner(model, solver=solver, update_every=4, exclude=["2"])
        per_step = []
        dist.all_reduce, dist.broadcast = watching(all_reduce), watching(broadcast)
        torch.linalg.cholesky_ex = factorise
        for _ in range(6):
            model(torch.ones(4, 8)).sum().backward()
            log.clear()
            known = ap.bytes_sent
            ap.step()
            per_step.append((ap.bytes_sent - known, list(log)))
        dist.all_reduce, dist.broadcast, torch.linalg.cholesky_ex = all_reduce, broadcast, cholesky
        outcomes[solver] = per_step
        ap.remove()
    return outcomes | {"inverted": inverted}


def failing(rank: int, world: int) -> dict[str, Any]:
    """One rank sees NaN, at the second refresh."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 3, bias=False), "b": nn.Linear(6, 3, bias=False)}).double()
    ap = ActivationPreconditioner(model, damping=0.1, update_every=2, ema=0.5)
    x = torch.randn(world, 8, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    results = {}
    for step in range(4):
        model.zero_grad()
        mine = x[rank].clone()
        if step == 2 and rank == 1:
            mine[0, 0] = torch.nan
        model["a"](mine).sum().backward()
        model["a"].weight.grad = torch.ones(3, 6, dtype=torch.double)
        ap.step()
        results[step] = model["a"].weight.grad.clone()
    summary = ap.summary()
    return {"steps": results, "rows": [row.rows for row in summary], "failures": [row.failures for row in summary]}


def early(rank: int, world: int) -> list[Tensor]:
    """A layer is first used between refreshes, by the last rank alone; the gradients of that layer, step by step."""
    torch.manual_seed(0)

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor, late: bool) -> Tensor:
            return self.a(x) + self.b(x) if late else self.a(x)

    model = DistributedDataParallel(Late().double(), find_unused_parameters=True)
    ap = ActivationPreconditioner(model, damping=0.1, update_every=10)
    gradients = []
    for step in range(5):
        model.zero_grad()
        model(rows(step, rank), step >= 2 and rank == world - 1).square().sum().backward()
        if step >= 2:
            model.module.b.weight.grad.fill_(1)
        ap.step()
        if step >= 2:
            gradients.append(model.module.b.weight.grad.clone())
    return gradients


def asked(rank: int, world: int) -> dict[str, Any]:
    """The first rank alone asks for a summary while refreshes are under way; state and gradients, step by step."""
    torch.manual_seed(0)
    model = nn.Linear(256, 4, bias=False)
    ap = ActivationPreconditioner(model, solver="auto", overlap=True, update_every=2, max_error=1e-3)
    results: dict[str, Any] = {"asked": 0}
    for step in range(10):
        model.zero_grad()
        model(torch.randn(90, 256, generator=torch.Generator().manual_seed(2 * step + rank))).square().sum().backward()
        dist.all_reduce(model.weight.grad)
        ap.step(measure=True)
        if ap._pending is not None:
            results["asked"] += 1
            if rank == 0:
                ap.summary()
        results[f"gradient {step}"] = model.weight.grad.clone()
    return results | {"state": ap.state_dict()}


def made_before_the_process_group() -> tuple[nn.Linear, ActivationPreconditioner]:
    """Few rows for the width: on one process it would keep these rather than a covariance."""
    torch.manual_seed(0)
    model = nn.Linear(40, 3).double()
    return model, ActivationPreconditioner(model, damping=0.1)


def of_one_process(model: nn.Linear, ap: ActivationPreconditioner, rank: int) -> Tensor:
    """The rewritten gradient, the same before on all ranks."""
    model(torch.randn(5, 40, dtype=torch.double, generator=torch.Generator().manual_seed(rank))).sum().backward()
    model.weight.grad = torch.ones(3, 40, dtype=torch.double)
    ap.step()
    return model.weight.grad.clone()


def rows(step: int, rank: int) -> Tensor:
    return torch.randn(5, 6, dtype=torch.double, generator=torch.Generator().manual_seed(10 * step + rank))


def runs(folder: Path) -> dict[str, Callable[[], Any]]:
    old = made_before_the_process_group()
    distributed.BUCKET_BYTES = BUCKET_BYTES
    join_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    return {name: lambda name=name: trained(rank, world, name) for name in SETTINGS} | {
        "counted": lambda: counted(rank, world),
        "failing": lambda: failing(rank, world),
        "early": lambda: early(rank, world),
        "asked": lambda: asked(rank, world),
        "old": lambda: of_one_process(*old, rank),
    }


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    return run_all(tmp_path_factory.mktemp("ranks"), runs, request.param)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_ranks_are_bit_identical_after_fifty_steps(ranks: list[dict[str, Any]], name: str) -> None:
    for other in ranks[1:]:
        assert_same(other[name], ranks[0][name])
    assert ranks[0][name]["state"]["steps"] == STEPS


@pytest.mark.parametrize("name", list(SETTINGS))
def test_ddp_equals_one_process_on_the_union_of_the_batch(ranks: list[dict[str, Any]], name: str) -> None:
    world = len(ranks)
    total = sum(size(r) for r in range(world))
    model = Net()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    losses = [lambda m, s, r=r, i=i: loss(m, s, r, i, total) for i in range(micro_batches(name)) for r in range(world)]
    ap, rewritten = train(model, losses, 1, SETTINGS[name])
    for step, (found, expected) in enumerate(zip(ranks[0][name]["rewritten"], rewritten, strict=True)):
        # A low-rank refresh sees little of the directions that its last basis lacks, and float32 rounds that little.
        tolerance = 5e-4 if name == "lowrank" and step > 0 else 1e-5
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).norm() <= tolerance * value.norm(), (step, key)
    for key, value in model.state_dict().items():
        moved, difference = (value - start[key]).norm(), (ranks[0][name]["weights"][key] - value).norm()
        assert (moved > 0) == (not key.startswith("frozen")), key
        assert difference <= min(1e-3 * moved, 1e-5 * value.norm()), key
    pooled = ranks[0][name]["state"]["layers"]
    for layer, state in ap.state_dict()["layers"].items():
        assert pooled[layer]["rows_seen"] == state["rows_seen"], layer
        assert pooled[layer]["refreshed_at"] == state["refreshed_at"], layer


def test_the_unused_layer_and_the_uneven_batches_were_there(ranks: list[dict[str, Any]]) -> None:
    layers = ranks[0]["exact"]["state"]["layers"]
    assert layers["readout.weight"]["rows_seen"] == sum(size(r) for r in range(len(ranks)))
    assert layers["sometimes.weight"]["rows_seen"] == sum(size(r) for r in range(len(ranks)) if r != 1)


def test_only_refreshes_send_and_bytes_sent_says_what(ranks: list[dict[str, Any]]) -> None:
    """Layers 0, 3, 4 and 5 read 8 features, layer 6 reads 160; the frozen 1 and the excluded 2 send nothing."""
    small, wide, single, count = 8, WIDTH, 4, 8
    packed = 4 * small**2 + wide * 128 + (wide - 128) ** 2
    exact_bytes = single * (packed + 4 * small**2 + wide**2) + 5 * count + 5 * count  # counts, and what was renewed
    tracked = {small: 8, wide: 48}
    lowrank_bytes = single * (4 * (small * tracked[small] + 1) + wide * tracked[wide] + 1) + 5 * count
    for rank in ranks:
        for said, log in rank["counted"]["exact"] + rank["counted"]["lowrank"]:
            assert said == sum(entry for entry in log if entry != "wait")
        assert [said for said, _ in rank["counted"]["exact"]] == [exact_bytes, 0, 0, 0, exact_bytes, 0]
        warm_up = [lowrank_bytes] * 3
        assert [said for said, _ in rank["counted"]["lowrank"]][:4] == [*warm_up, 0]


def test_every_sum_is_under_way_before_one_is_waited_for(ranks: list[dict[str, Any]]) -> None:
    """Row counts, the wide layer's sums and the narrow ones': the wait for one is spent on the others."""
    sums = {"exact": [40, 4 * (WIDTH * 128 + 32**2), 4 * 4 * 8**2], "lowrank": [40, 4 * (WIDTH * 48 + 1), 4 * 4 * 65]}
    for rank in ranks:
        for solver, sizes in sums.items():
            _, log = rank["counted"][solver][0]
            runs = [list(run) for _, run in groupby(log, lambda entry: entry == "wait")]
            assert runs[0] == sizes
            assert len(runs) == (4 if solver == "exact" else 2)  # the exact solver sends inverses, all at once too
            for sent, waits in zip(runs[::2], runs[1::2], strict=True):
                assert len(sent) == len(waits)


def test_each_rank_inverts_its_share_only(ranks: list[dict[str, Any]]) -> None:
    """The wide one, of 8000 times the cost of a small one, on one rank; the small ones on the others."""
    inverted: list[dict[int, int]] = []
    for rank in ranks:
        blocks: dict[int, int] = {}
        for count, dim in rank["counted"]["inverted"]:
            blocks[dim] = blocks.get(dim, 0) + count
        inverted.append(blocks)
    refreshes = 2
    assert sum(blocks.get(WIDTH, 0) for blocks in inverted) == refreshes
    assert sum(blocks.get(8, 0) for blocks in inverted) == 4 * refreshes
    for blocks in inverted:
        assert not (blocks.get(WIDTH, 0) and blocks.get(8, 0))
        assert blocks.get(WIDTH, 0) or blocks.get(8, 0) == 4 * refreshes // (len(ranks) - 1)


def test_nan_on_one_rank_keeps_the_last_good_inverse_on_all(ranks: list[dict[str, Any]]) -> None:
    world = len(ranks)
    x = torch.randn(world, 8, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    sigma = x.T @ x / len(x)
    inverse = torch.linalg.inv(sigma + 0.1 * sigma.trace() * torch.eye(6, dtype=torch.double))
    for rank in ranks:
        for found in rank["failing"]["steps"].values():
            torch.testing.assert_close(found, torch.ones(3, 6, dtype=torch.double) @ inverse)
        assert rank["failing"]["rows"] == [8 * world, 0]
        assert rank["failing"]["failures"] == [1, 0]


def test_one_rank_may_ask_for_a_summary_alone(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["asked"]["asked"] > 0
    for other in ranks[1:]:
        assert_same(other["asked"], ranks[0]["asked"])


def test_a_layer_first_used_by_one_rank_between_refreshes_has_an_inverse_on_all_at_the_next_step(
    ranks: list[dict[str, Any]],
) -> None:
    x = rows(3, len(ranks) - 1)  # of the early refresh, in which the other ranks have no row to add
    sigma = x.T @ x / len(x)
    inverse = torch.linalg.inv(sigma + 0.1 * sigma.trace() * torch.eye(6, dtype=torch.double))
    ones = torch.ones(3, 6, dtype=torch.double)
    for rank in ranks:
        first, second, third = rank["early"]
        assert torch.equal(first, ones)
        torch.testing.assert_close(second, ones @ inverse)
        assert torch.equal(third, second)


def test_a_preconditioner_older_than_the_process_group_pools_all_the_same(ranks: list[dict[str, Any]]) -> None:
    x = torch.cat(
        [torch.randn(5, 40, dtype=torch.double, generator=torch.Generator().manual_seed(r)) for r in range(len(ranks))]
    )
    sigma = x.T @ x / len(x)
    expected = torch.ones(3, 40, dtype=torch.double) @ torch.linalg.inv(
        sigma + 0.1 * sigma.trace() * torch.eye(40, dtype=torch.double)
    )
    for outcome in ranks:
        torch.testing.assert_close(outcome["old"], expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(outcome["old"], ranks[0]["old"])
