"""Sharded weights with real processes: FSDP2 equals DDP, tensor parallelism one process, and no gradient is gathered.

All scenarios run in one pair of processes, since starting it takes longer than any of them. Each returns what it wants
examined; the tests examine it in the main process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RANKS, join_group, outcomes_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dopr_lightning import ActivationPreconditioner

STEPS = 20
OPTIONS: dict[str, Any] = {"damping": 0.1, "update_every": 3, "ema": 0.5, "solver": "exact"}
LOW_RANK: dict[str, Any] = {"solver": "lowrank", "max_error": 0.02, "overlap": True}
WIDTH = 72
"""Of the widest layers: the low-rank solver tracks 48 directions at most."""

Data = Callable[[int], list[Tensor]]
"""The micro-batches of a step."""


class Net(nn.Module):
    """Every kind of layer, split unevenly over two ranks: 7 rows, 5 tokens, and one row that leaves a rank without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 8, 2)
        self.hidden = nn.Linear(8, 7)
        self.norm = nn.LayerNorm(7)
        self.wide = nn.Linear(7, WIDTH)
        self.twin = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.twin.weight
        self.readout, self.second = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.embedding(tokens).mT).mT)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = torch.tanh(self.up(h.mT).mT)
        h = torch.tanh(self.wide(self.norm(self.hidden(h))))
        h = torch.tanh(self.other(torch.tanh(self.twin(h))))
        return self.readout(h) + self.second(h)


def tokens(step: int) -> list[Tensor]:
    """Two micro-batches, of another size on each rank."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return [torch.randint(5, (2 + dist.get_rank(), 6), generator=generator) for _ in range(2)]


def vectors(seed: int) -> Data:
    """One batch per step, the same wherever the seed is."""

    def data(step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1000 * step + seed)
        return [torch.randn(9, 6, generator=generator)]

    return data


def train(model: nn.Module, ap: ActivationPreconditioner, data: Data) -> dict[str, Tensor]:
    """The weights after some steps, whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        *first, last = data(step)
        with without_sync(model):
            for batch in first:
                model(batch).square().mean().backward()
        model(last).square().mean().backward()
        ap.step()
        optimizer.step()
    return whole(model)


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def shard(model: Net, mesh: DeviceMesh | None = None) -> Net:
    """Some layers on their own, the rest with the root."""
    fully_shard(model.up, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else Shard(0))
    for module in (model.conv, model.hidden, model.readout):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))


def ddp(**options: Any) -> dict[str, Tensor]:
    model = DistributedDataParallel(Net())
    return train(model, ActivationPreconditioner(model, **OPTIONS | options), tokens)


def fsdp(mesh: DeviceMesh | None = None, **options: Any) -> dict[str, Tensor]:
    model = shard(Net(), mesh)
    return train(model, ActivationPreconditioner(model, **OPTIONS | options), tokens)


def sharded_after_the_preconditioner_was_made() -> dict[str, Tensor]:
    model = Net()
    ap = ActivationPreconditioner(model, **OPTIONS)
    return train(shard(model), ap, tokens)


def made_while_the_root_is_gathered() -> dict[str, Tensor]:
    model = shard(Net())
    parameters = list(model.parameters())
    with torch.no_grad():
        model(tokens(0)[0])
    return train(model, ActivationPreconditioner(model, parameters=parameters, **OPTIONS), tokens)


def communication() -> list[dict[str, int]]:
    """Per step, how often each collective ran inside of it."""
    model = shard(Net())
    ap = ActivationPreconditioner(model, **OPTIONS)
    counts = []
    for step in range(4):
        model(tokens(step)[0]).square().mean().backward()
        with CommDebugMode() as debug:
            ap.step()
        counts.append({str(op): n for op, n in debug.get_comm_counts().items() if n})
    return counts


def states(**options: Any) -> dict[str, Any]:
    model = shard(Net())
    ap = ActivationPreconditioner(model, **OPTIONS | options)
    train(model, ap, tokens)
    return ap.state_dict()


def measured(model: nn.Module) -> dict[str, tuple[float | None, float | None]]:
    """Cosine and RMS of each parameter's rewrite."""
    ap = ActivationPreconditioner(model, **OPTIONS, bias=True)
    model(tokens(0)[0]).square().mean().backward()
    ap.step(measure=True)
    return {row.parameter: (row.cosine, row.update_rms) for row in ap.summary() if row.covered}


def mixed_precision() -> dict[str, Tensor]:
    """Gradients before and after, and the inputs of all ranks."""
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(6, 5, bias=False), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    ap = ActivationPreconditioner(model, damping=0.1, solver="exact")
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    model(x).square().mean().backward()
    before = model.weight.grad.full_tensor().clone()
    ap.step()
    assert model.weight.grad.dtype == torch.float32
    inputs = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(inputs, x)
    return {"before": before, "after": model.weight.grad.full_tensor(), "x": torch.cat(inputs)}


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x + self.embedding(x[:, 0].abs().mul(10).long() % 5))))


def tensor_parallel(mesh: DeviceMesh) -> Parallel:
    """The embedding by its tokens, 3 + 2; one Linear by its outputs; the other whole on both ranks."""
    plan = {"embedding": RowwiseParallel(input_layouts=Replicate()), "up": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(Parallel(), mesh, plan)


def column_wise() -> dict[str, Tensor]:
    model = tensor_parallel(init_device_mesh("cpu", (RANKS,)))
    return train(model, ActivationPreconditioner(model, **OPTIONS), vectors(0))


def fsdp_and_tensor_parallel() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    model = tensor_parallel(mesh["tensor"])
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh["data"])
    return train(model, ActivationPreconditioner(model, **OPTIONS), vectors(0))


def sequence_parallel() -> dict[str, Tensor]:
    """A replicated Linear on shards of a sequence: each rank's gradient is a summand of the whole."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    model = nn.Linear(6, 5, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
    ap = ActivationPreconditioner(model, damping=0.1, solver="exact")
    x = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    model(distribute_tensor(x, mesh, [Shard(1)])).square().sum().full_tensor().backward()
    before = model.weight.grad.full_tensor().clone()
    ap.step()
    return {"before": before, "after": model.weight.grad.full_tensor(), "x": x.flatten(0, 1)}


def a_part_of_the_ranks() -> dict[str, Tensor]:
    """Every rank trains a model of its own, sharded over itself alone, on data of its own."""
    mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("models", "data"))
    model = fully_shard(Parallel(), mesh=mesh["data"])
    ap = ActivationPreconditioner(model, process_group=mesh.get_group("data"), **OPTIONS)
    return train(model, ap, vectors(dist.get_rank()))


def refusals() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (RANKS,))

    def row_wise(**options: Any) -> None:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        ActivationPreconditioner(parallelize_module(Parallel(), mesh, plan), **options)

    def sharded(module: nn.Module, **options: Any) -> None:
        ActivationPreconditioner(fully_shard(nn.Sequential(module, nn.Linear(4, 4))), **options)

    attempts: dict[str, Callable[[], None]] = {
        "row-wise": row_wise,
        "row-wise, excluded": lambda: row_wise(exclude=["down"]),
        "transposed": lambda: sharded(nn.ConvTranspose1d(4, 4, 3)),
        "grouped": lambda: sharded(nn.Conv1d(4, 4, 3, groups=2)),
        "grouped, excluded": lambda: sharded(nn.Conv1d(4, 4, 3, groups=2), exclude=["0"]),
        "patches": lambda: sharded(nn.Conv1d(4, 4, 3), conv="patch"),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            messages[name] = ""
        except ValueError as error:
            messages[name] = str(error)
    return messages


SCENARIOS: dict[str, Callable[[], Any]] = {
    "ddp, exact": lambda: ddp(bias=True),
    "fsdp, exact": lambda: fsdp(bias=True),
    "ddp, inverses": lambda: ddp(update_every=10),
    "fsdp, inverses": lambda: fsdp(update_every=10),
    "ddp, lowrank": lambda: ddp(**LOW_RANK),
    "fsdp, lowrank": lambda: fsdp(**LOW_RANK),
    "ddp": ddp,
    "hybrid": lambda: fsdp(replicated_mesh()),
    "sharded after": sharded_after_the_preconditioner_was_made,
    "made while gathered": made_while_the_root_is_gathered,
    "communication": communication,
    "states, exact": states,
    "states, lowrank": lambda: states(**LOW_RANK),
    "measured, ddp": lambda: measured(DistributedDataParallel(Net())),
    "measured, fsdp": lambda: measured(shard(Net())),
    "measured, hybrid": lambda: measured(shard(Net(), replicated_mesh())),
    "mixed precision": mixed_precision,
    "column-wise": column_wise,
    "fsdp and tensor parallel": fsdp_and_tensor_parallel,
    "sequence parallel": sequence_parallel,
    "a part of the ranks": a_part_of_the_ranks,
    "refusals": refusals,
}


def runs(folder: Path) -> dict[str, Callable[[], Any]]:
    join_group()
    return SCENARIOS


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What a scenario returned on each rank."""
    return outcomes_of(tmp_path_factory.mktemp("sharded"), runs)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], start: nn.Module) -> None:
    assert found.keys() == expected.keys()
    for name, initial in start.named_parameters():
        difference = (found[name] - expected[name]).norm()
        # A bias of one entry may pass by 0, where rounding is still that of the values on its way.
        assert difference <= 1e-5 * torch.maximum(expected[name].norm(), initial.norm()), name
        assert difference < 1e-3 * (expected[name] - initial).norm(), name


def assert_preconditioned(gradients: dict[str, Tensor], rows: Tensor) -> None:
    """Against the formula in float64."""
    rows = rows.double()
    sigma = rows.T @ rows / len(rows)
    damped = sigma + 0.1 * sigma.trace() * torch.eye(sigma.shape[0])
    expected = torch.linalg.solve(damped, gradients["before"].double(), left=False)
    torch.testing.assert_close(gradients["after"].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("sharded", "replicated"),
    [
        ("fsdp, exact", "ddp, exact"),
        ("fsdp, inverses", "ddp, inverses"),
        ("fsdp, lowrank", "ddp, lowrank"),
        ("hybrid", "ddp"),
        ("sharded after", "ddp"),
        ("made while gathered", "ddp"),
    ],
)
def test_fsdp_equals_ddp(outcome: Callable[[str], list[Any]], sharded: str, replicated: str) -> None:
    expected, _ = outcome(replicated)
    for found in outcome(sharded):
        assert_equal(found, expected, Net())


@pytest.mark.parametrize("sharded", ["measured, fsdp", "measured, hybrid"])
def test_what_is_measured_is_of_whole_gradients(outcome: Callable[[str], list[Any]], sharded: str) -> None:
    expected, _ = outcome("measured, ddp")
    for found in outcome(sharded):
        assert found.keys() == expected.keys()
        for name, (cosine, rms) in expected.items():
            assert found[name] == pytest.approx((cosine, rms), rel=1e-4), name


def test_a_step_gathers_no_gradient(outcome: Callable[[str], list[Any]]) -> None:
    for refresh, *between, again in outcome("communication"):
        # Sums and counts are summed, inverses sent by the rank that computed them.
        assert {op.removeprefix("c10d.") for op in refresh} <= {"allreduce_", "broadcast_"}
        assert refresh
        assert between == [{}, {}]
        assert again == refresh


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
def test_state_is_the_same_on_all_ranks(outcome: Callable[[str], list[Any]], solver: str) -> None:
    def flat(value: Any) -> list[Any]:
        return [leaf for inner in value.values() for leaf in flat(inner)] if isinstance(value, dict) else [value]

    one, other = map(flat, outcome(f"states, {solver}"))
    assert sum(isinstance(leaf, Tensor) for leaf in one) > 8
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def test_the_low_rank_solver_left_directions_out(outcome: Callable[[str], list[Any]]) -> None:
    for state in outcome("states, lowrank"):
        for name in ("twin.weight", "readout.weight"):
            tensors = state["layers"][name]["tensors"]
            _, dim, tracked = tensors["basis"].shape
            assert 0 < tensors["coefficients"].count_nonzero() <= tracked < dim == WIDTH


def test_mixed_precision_keeps_statistics_in_full_precision(outcome: Callable[[str], list[Any]]) -> None:
    for gradients in outcome("mixed precision"):
        assert_preconditioned(gradients, gradients["x"].bfloat16())


@pytest.mark.parametrize("name", ["column-wise", "fsdp and tensor parallel"])
def test_tensor_parallelism_equals_one_process(outcome: Callable[[str], list[Any]], name: str) -> None:
    model = Parallel()
    expected = train(model, ActivationPreconditioner(model, **OPTIONS), vectors(0))
    one, other = outcome(name)
    assert_equal(one, expected, Parallel())
    assert all(torch.equal(one[parameter], other[parameter]) for parameter in one)


def test_rows_are_pooled_where_ranks_share_a_sequence(outcome: Callable[[str], list[Any]]) -> None:
    for gradients in outcome("sequence parallel"):
        assert_preconditioned(gradients, gradients["x"])


def test_only_the_ranks_of_a_given_group_are_pooled(outcome: Callable[[str], list[Any]]) -> None:
    for rank, found in enumerate(outcome("a part of the ranks")):
        model = Parallel()
        assert_equal(found, train(model, ActivationPreconditioner(model, **OPTIONS), vectors(rank)), Parallel())


def test_what_splits_an_input_is_refused_with_a_way_out(outcome: Callable[[str], list[Any]]) -> None:
    for messages in outcome("refusals"):
        assert messages["row-wise"].startswith("down.weight: its shape (3, 8) is sharded along dimension 1")
        assert "ColwiseParallel in place of RowwiseParallel" in messages["row-wise"]
        assert messages["transposed"].startswith("0.weight: its shape (4, 4, 3) is sharded along dimension 0")
        assert "Shard(1)" in messages["transposed"]
        assert messages["grouped"].startswith("0.weight: its shape (4, 2, 3) is sharded along dimension 0")
        assert messages["grouped"].endswith("Exclude the module.")
        assert messages["row-wise, excluded"] == messages["grouped, excluded"] == messages["patches"] == ""
