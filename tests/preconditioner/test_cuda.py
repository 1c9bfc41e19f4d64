"""On a GPU: the numbers of the CPU, and a host that does not wait. Skipped where there is none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import join_group, run_all
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner import replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EVERY = 5

SOLVERS: dict[str, dict[str, Any]] = {
    "exact": {"solver": "exact", "ema": 0.5},
    "factors": {"solver": "exact"},
    "woodbury": {"solver": "exact", "max_rows": 3},
    "lowrank": {"solver": "lowrank", "max_error": 1e-9},
    "overlap": {"solver": "lowrank", "max_error": 1e-9, "overlap": True},
}


class Net(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 12)
        self.conv1 = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.conv2 = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(24, 8, 4, stride=2)
        self.hidden = nn.Linear(8, 40)
        self.deeper = nn.ModuleList([nn.Linear(40, 40) for _ in range(2)])  # counted and rewritten together
        self.readout = nn.Linear(40, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv1(self.embedding(tokens).mT).mT  # (B, 8, 12)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = torch.tanh(self.conv2(h[:, None])).flatten(1, 2)[:, :, :6].mT  # (B, 6, 16)
        h = torch.cat([h, h[..., :8]], -1).mT
        h = torch.tanh(self.hidden(torch.tanh(self.up(h)).mean(-1)))
        for layer in self.deeper:
            h = torch.tanh(layer(h))
        return self.readout(h)


def tokens(step: int, size: int = 6) -> Tensor:
    return torch.randint(11, (size, 8), generator=torch.Generator().manual_seed(step))


def run(model: nn.Module, x: Tensor, ap: ActivationPreconditioner | None = None, *, autocast: bool = False) -> None:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().mean()
    loss.backward()
    if ap is not None:
        ap.step()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < tolerance, name


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions round to TF32 by default."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_become_those_of_the_cpu_in_float64(name: str) -> None:
    options = {"damping": 0.1, "update_every": 2} | SOLVERS[name]
    reference = Net().double()
    model = copy.deepcopy(reference).float().cuda()
    aps = [ActivationPreconditioner(m, **options) for m in (reference, model)]
    with full_precision():
        for step in range(8):
            run(reference, tokens(step), aps[0])
            run(model, tokens(step).cuda(), aps[1])
            assert_close(gradients(model), gradients(reference), 2e-4)
    assert [row.solver for row in aps[0].summary()] == [row.solver for row in aps[1].summary()]


def deep(layers: int, width: int = 256) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))).cuda()


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_too_large_for_copies_are_rewritten_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two queues of launches, while the first is busy."""
    monkeypatch.setattr(replay, "LARGEST", 0)
    torch.manual_seed(0)
    widths = (256, 1024, 768, 512, 256)
    model = nn.Sequential(*(nn.Linear(*sizes) for sizes in pairwise(widths))).cuda()
    reference = copy.deepcopy(model)
    aps = [ActivationPreconditioner(m, update_every=EVERY, **SOLVERS[name]) for m in (model, reference)]
    monkeypatch.setattr(aps[1]._replay, "apply", lambda stacks: [stack.apply() for stack in stacks])
    for step in range(3 * EVERY):
        x = torch.randn(4096, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        for m, ap in zip((model, reference), aps, strict=True):
            run(m, x, ap)
        found, expected = gradients(model), gradients(reference)
        assert all(torch.equal(found[key], expected[key]) for key in expected), step
    assert set(aps[0]._replay._recordings.values()) <= {None}


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_between_refreshes_never_wait_for_the_device(name: str) -> None:
    model = deep(3)
    ap = ActivationPreconditioner(model, update_every=EVERY, **SOLVERS[name])
    optimizer = torch.optim.AdamW(model.parameters())
    batches = [torch.randn(64, 256, device="cuda") for _ in range(4 * EVERY)]
    checked = 0
    for step, x in enumerate(batches):
        check = step >= 2 * EVERY and not ap.collecting  # by then what can be recorded is
        torch.cuda.set_sync_debug_mode("error" if check else "default")
        try:
            run(model, x, ap)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checked += check
    assert checked == 2 * (EVERY - 1)


def waits(function: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the host waits for the device: as PyTorch notices, and for events, which it does not."""
    synchronize, events = torch.cuda.Event.synchronize, []

    def noted(event: torch.cuda.Event) -> None:
        events.append(event)
        synchronize(event)

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught, monkeypatch.context() as patch:
            patch.setattr(torch.cuda.Event, "synchronize", noted)
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught) + len(events)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_refresh_waits_equally_often_whatever_the_number_of_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for layers in (2, 7):
        model = deep(layers)
        ap = ActivationPreconditioner(model, **SOLVERS[name])
        x = torch.randn(64, 256, device="cuda")
        for _ in range(4):  # the audit looks at the first gradients
            run(model, x, ap)
        counts.append(waits(lambda model=model, x=x, ap=ap: run(model, x, ap), monkeypatch))
    assert 1 <= counts[0] == counts[1]


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
def test_a_step_that_overlaps_with_a_refresh_never_waits_and_the_next_for_that_alone(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deep(3)
    ap = ActivationPreconditioner(model, update_every=EVERY, overlap=True, solver=solver, ema=0.5)
    x = torch.randn(64, 256, device="cuda")
    for _ in range(2 * EVERY):
        run(model, x, ap)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(model, x, ap)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts = [waits(lambda: run(model, x, ap), monkeypatch) for _ in range(EVERY - 1)]
    assert counts[0] <= 1  # for what is on its way since
    assert counts[1:] == [0] * (EVERY - 2)
    assert [row.rows for row in ap.summary() if row.covered] == [64] * 3


@pytest.mark.parametrize("name", SOLVERS)
def test_a_forward_in_another_queue_is_counted_before_the_step(name: str) -> None:
    waiting, reference = (nn.Sequential(*(nn.Linear(40, 40) for _ in range(3))).cuda() for _ in range(2))
    waiting.load_state_dict(reference.state_dict())
    aps = [ActivationPreconditioner(model, update_every=3, **SOLVERS[name]) for model in (waiting, reference)]
    queue = torch.cuda.Stream()
    for step in range(7):
        x = torch.randn(64, 40, generator=torch.Generator().manual_seed(step)).cuda()
        run(reference, x, aps[1])
        torch.cuda.synchronize()
        waiting.zero_grad()
        with torch.cuda.stream(queue):
            torch.cuda._sleep(20_000_000)
            loss = waiting(x).square().mean()
        torch.cuda.current_stream().wait_stream(queue)
        loss.backward()
        aps[0].step()
        assert_close(gradients(waiting), gradients(reference), 1e-5)


def test_bfloat16_autocast_leaves_the_statistics_in_float32() -> None:
    model = deep(2, 32)
    plain = copy.deepcopy(model)
    ap = ActivationPreconditioner(model, damping=0.1, solver="exact")
    x = torch.randn(128, 32, device="cuda")
    run(model, x, ap, autocast=True)
    run(plain, x, autocast=True)
    # The first layer sees x itself, the closed form needs no layer before it.
    z = x.to(torch.bfloat16).double()
    sigma = z.mT @ z / len(z)
    damped = sigma + 0.1 * sigma.trace() * torch.eye(32, device="cuda", dtype=torch.double)
    expected = plain[0][0].weight.grad.double() @ torch.linalg.inv(damped)
    found = model[0][0].weight.grad.double()
    assert float((found - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("name", SOLVERS)
def test_tf32_leaves_the_rewrites_close(name: str) -> None:
    reference = deep(2, 64).double()
    model = copy.deepcopy(reference).float()
    aps = [ActivationPreconditioner(m, update_every=2, **SOLVERS[name]) for m in (reference, model)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for step in range(5):
            x = torch.randn(256, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            run(reference, x.double(), aps[0])
            run(model, x, aps[1])
            assert_close(gradients(model), gradients(reference), 0.02)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not any(row.failures for row in aps[1].summary())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_step_that_float16_overflows_leaves_no_trace(name: str) -> None:
    """As the callback does it: what GradScaler skips is discarded."""
    models = [deep(2, 64), deep(2, 64)]
    aps = [ActivationPreconditioner(m, damping=0.1, update_every=2, **SOLVERS[name]) for m in models]
    for model, ap, broken in zip(models, aps, (False, True), strict=True):
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=256.0)
        for step, factor in enumerate((1.0, 1.0, 1e30 if broken else None, 1.0, 1.0)):
            if factor is None:
                continue
            x = torch.randn(96, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = model(x).float().square().mean() * factor
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if factor > 1:
                ap.discard()
            else:
                ap.step()
            scaler.step(optimizer)
            scaler.update(256.0)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models_are_rewritten_alike(mode: str) -> None:
    eager = deep(2, 64)
    model = copy.deepcopy(eager)
    aps = [ActivationPreconditioner(m, damping=0.1, update_every=2) for m in (eager, model)]
    compiled = torch.compile(model, mode=mode)
    for step in range(6):
        x = torch.randn(96, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        run(eager, x, aps[0])
        run(compiled, x, aps[1])
        assert_close(gradients(model), gradients(eager), 1e-4)


def test_a_resume_continues_bit_for_bit() -> None:
    models = [deep(2, 256), deep(2, 256)]
    aps = [ActivationPreconditioner(m, update_every=2, ema=0.5) for m in models]
    batches = [torch.randn(64, 256, device="cuda") for _ in range(8)]
    for x in batches[:4]:
        run(models[0], x, aps[0])
    aps[1].load_state_dict(aps[0].state_dict())
    for x in batches[4:]:
        for model, ap in zip(models, aps, strict=True):
            run(model, x, ap)
        assert all(torch.equal(a, b) for a, b in zip(*(gradients(m).values() for m in models), strict=True))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of NCCL with this process in it; a second would need a second GPU."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", SOLVERS)
def test_sharded_by_fsdp_over_nccl_equals_whole(name: str) -> None:
    whole = deep(2, 64)
    sharded = copy.deepcopy(whole)
    for block in sharded:
        fully_shard(block)
    fully_shard(sharded)
    aps = [ActivationPreconditioner(m, damping=0.1, update_every=2, **SOLVERS[name]) for m in (whole, sharded)]
    for step in range(5):
        x = torch.randn(96, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        for model, ap in zip((whole, sharded), aps, strict=True):
            run(model, x, ap)
        found = {name: p.grad.full_tensor().double().cpu() for name, p in sharded.named_parameters()}
        assert_close(found, gradients(whole), 1e-5)


def two_ranks(folder: Path) -> dict[str, Callable[[], Any]]:
    return {"trained": in_parallel}


def in_parallel() -> dict[str, Tensor]:
    """Half of each batch; NCCL wants a GPU per rank, gloo sends a shared one's tensors."""
    join_group()
    rank = torch.distributed.get_rank()
    model = DistributedDataParallel(Net().cuda(), find_unused_parameters=True)
    return trained(model, lambda step: tokens(step)[3 * rank : 3 * rank + 3].cuda())


def trained(model: nn.Module, batch: Callable[[int], Tensor]) -> dict[str, Tensor]:
    with full_precision():
        ap = ActivationPreconditioner(model, damping=0.1, update_every=2, ema=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(10):
            run(model, batch(step), ap)
            optimizer.step()
    return {name.removeprefix("module."): p.detach().double().cpu() for name, p in model.named_parameters()}


def test_two_ranks_on_one_gpu_equal_one(tmp_path: Path) -> None:
    ranks = [outcome["trained"] for outcome in run_all(tmp_path, two_ranks)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert_close(ranks[0], trained(Net().cuda(), lambda step: tokens(step).cuda()), 1e-5)
