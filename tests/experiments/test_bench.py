"""``dopr bench``: what it compares is comparable, what it counts is right, and its predictions are checkable."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.bench import elsewhere
from dopr_lightning.bench.cholesky import PlainCholesky
from dopr_lightning.bench.elsewhere import H100, resolve
from dopr_lightning.bench.machine import TRACKED, Rates
from dopr_lightning.bench.main import main
from dopr_lightning.bench.measure import Limits, Quartiles, Variant, paired_intervals, peak_bytes
from dopr_lightning.bench.plan import count_rows, held_bytes, observed, plan
from dopr_lightning.bench.predict import predict
from dopr_lightning.bench.workloads import Workload, workloads
from dopr_lightning.errors import UserError

CPU = torch.device("cpu")
FREE = 1e30
UNIT = Rates(
    square=1,
    skinny=1,
    touch=0,
    read=0,
    factor=1,
    inverse=1,
    nystrom=1,
    small=0,
    bandwidth=FREE,
    strided=FREE,
    rearranged=FREE,
    call=0,
)
"""A second per FLOP, and nothing else takes time."""


class Small(nn.Module):
    """A strided convolution with fewer positions than it has inputs, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 70, 3, stride=2)
        self.readout = nn.Linear(70, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(torch.tanh(self.conv(x)).mean(-1))


def small() -> Workload:
    def draw(size: int, generator: torch.Generator) -> Any:
        return (torch.randn(size, 6, 9, generator=generator),), torch.randn(size, 5, generator=generator)

    return Workload("small", 40, Small, draw)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of the command on a small batch, and its results."""
    output = tmp_path_factory.mktemp("bench")
    options = "--quick --models mlp-256 --batch 32 --threads 1 --update-every 4 --ranks 2 --output"
    main([*options.split(), str(output)])
    return output, json.loads((output / "results.json").read_text())


def test_a_run_leaves_results_and_a_plot_that_say_nothing_of_the_machine(run: tuple[Path, dict[str, Any]]) -> None:
    output, results = run
    assert (output / "bench.png").stat().st_size > 1000
    text = (output / "results.json").read_text()
    assert str(output) not in text
    assert str(Path.cwd()) not in text
    assert socket.gethostname() not in text
    (row,) = results["rows"]
    assert (row["model"], row["batch"], results["settings"]["update_every"]) == ("mlp-256", 32, 4)
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    assert row["goal"] is None  # it was set for other options


def test_the_time_is_split_into_the_phases_of_the_preconditioner(run: tuple[Path, dict[str, Any]]) -> None:
    (row,) = run[1]["rows"]
    assert set(row["phases"]) == {"statistics", "reduce", "solve", "apply", "other"}
    assert all(row["phases"][phase] > 0 for phase in ("statistics", "solve", "apply"))
    assert sum(row["phases"].values()) == pytest.approx(row["overhead_seconds"]["median"])
    assert row["floor_seconds"] == pytest.approx(row["flops"] / row["rates"]["square"])


def test_predicted_memory_and_bytes_are_those_measured(run: tuple[Path, dict[str, Any]]) -> None:
    (row,) = run[1]["rows"]
    assert row["predicted"]["held_bytes"] == pytest.approx(row["held_bytes"], rel=0.02)
    assert [entry["solver"] for entry in run[1]["communication"]] == ["exact", "lowrank"]
    for entry in run[1]["communication"]:
        assert entry["bytes_per_step"] == pytest.approx(entry["predicted"], rel=0.02)
    exact, low_rank = run[1]["communication"]
    assert exact["bytes_per_step"] > 2 * low_rank["bytes_per_step"]


def test_the_exact_solver_holds_its_covariances_packed_and_one_copy_of_inverses() -> None:
    (workload,) = workloads(["mlp-512"], [600])
    variant = Variant(workload, CPU, None, lambda model: ActivationPreconditioner(model, solver="exact"))
    variant.step(workload.batches(1, CPU)[0])
    layers = [module.in_features for module in variant.model.modules() if isinstance(module, nn.Linear)]
    assert held_bytes(variant.preconditioner) <= 1.001 * sum(
        4 * (d * (d + max(128, d / 4)) / 2 + d * d) for d in layers
    )


def test_plain_cholesky_makes_the_same_update() -> None:
    variants = [
        Variant(small(), CPU, None, made)
        for made in (PlainCholesky, lambda m: ActivationPreconditioner(m, solver="exact"))
    ]
    ((inputs, target),) = small().batches(1, CPU)
    for variant in variants:
        F.mse_loss(variant.model(*inputs), target).backward()
        before = variant.model.conv.weight.grad.clone()
        variant.preconditioner.step()
        assert not torch.allclose(variant.model.conv.weight.grad, before)
    for plain, ours in zip(*(variant.model.parameters() for variant in variants), strict=True):
        torch.testing.assert_close(plain.grad, ours.grad, rtol=1e-4, atol=1e-5)


def test_a_compiled_variant_takes_the_same_steps() -> None:
    made = partial(ActivationPreconditioner, solver="exact", update_every=2)
    plain, compiled = (Variant(small(), CPU, None, made, mode) for mode in (None, "default"))
    for batch in small().batches(3, CPU):
        plain.step(batch)
        compiled.step(batch)
    assert compiled.model._compiled_call_impl is not None
    for one, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Clock(Variant):
    """A variant whose step takes as many seconds as said, and which notes when it was made."""

    def __init__(self, name: str, taken: list[float], log: list[str]) -> None:
        self.name, self.taken, self.log = name, iter(taken), log

    def step(self, batch: Any) -> None:
        self.log.append(self.name.lower())

    def seconds(self, batches: Any) -> float:
        self.log.append(self.name * len(batches))
        return sum(next(self.taken) for _ in batches)


def test_intervals_are_means_over_steps_in_turn() -> None:
    log: list[str] = []
    variants = [Clock("A", [1.0, 2, 3, 4], log), Clock("B", [10.0, 20, 30, 40], log)]
    intervals = list(paired_intervals(variants, [None], 2, Limits(least=1, most=2, budget=0.0)))[:2]
    assert intervals == [[1.5, 15.0]]  # the budget is spent at once, so there is but the least
    warm_up, timed = log[: -2 * 2], log[-2 * 2 :]
    assert warm_up == ["a", "b"] * 4  # two intervals: the fewest with four steps
    assert timed == ["A", "B", "B", "A"]


def test_an_arm_may_take_its_turn_for_a_whole_interval() -> None:
    log: list[str] = []
    variants = [Clock("A", [1.0, 2, 3, 4], log), Clock("B", [10.0, 20, 30, 40], log)]
    intervals = list(paired_intervals(variants, [None], 2, Limits(least=2, most=2, budget=0.0), turn=2))
    assert intervals == [[1.5, 15.0], [3.5, 35.0]]
    assert log[-4:] == ["AA", "BB", "BB", "AA"]


def test_quartiles_of_a_few_values() -> None:
    assert Quartiles.of([5.0]) == Quartiles(5, 5, 5)
    assert Quartiles.of([1.0, 2, 3, 4, 5]) == Quartiles(2, 3, 4)


def test_the_peak_counts_what_is_alive_at_once() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1 << 18))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                torch.empty(1 << 20)  # three in turn, freed before the next
            return x * self.weight.sum()

    workload = Workload("wasteful", 1, Wasteful, lambda size, generator: ((torch.ones(1),), torch.ones(1)))
    variant = Variant(workload, CPU, None, None)
    batch = workload.batches(1, CPU)[0]
    variant.step(batch)
    # Parameter, two averages of AdamW and the buffer: the gradient was freed before the forward.
    assert peak_bytes(variant, batch, held=100) == pytest.approx(4 * (3 * 2**18 + 2**20) + 100, rel=0.01)


@pytest.mark.parametrize("solver", ["exact", "lowrank", "auto"])
def test_the_plan_of_a_model_on_no_device_is_what_is_then_done(solver: Any) -> None:
    workload = small()
    model = workload.model("meta")
    ((inputs, _),) = workload.batches(1, "meta")
    rows = count_rows(model, lambda model: model(*inputs))
    assert rows == {"conv.weight": 40 * 9, "readout.weight": 40}
    planned = plan(model, rows, solver=solver)
    variant = Variant(
        workload, CPU, None, lambda model: ActivationPreconditioner(model, solver=solver, update_every=10)
    )
    variant.step(workload.batches(1, CPU)[0])

    def known(layers: Any) -> Any:  # the directions in use follow from the data
        return sorted((x.size.name, x.size, replace(x.method, rank=0)) for x in layers)

    assert known(planned) == known(observed(variant.preconditioner))


def test_the_floor_is_the_flops_at_the_speed_of_square_products() -> None:
    model = nn.Linear(8, 3, bias=False)
    planned = plan(model, 20, solver="exact", update_every=5)
    prediction = predict(planned, UNIT, update_every=5)
    # Gram product 2 n d^2 in one panel and inverse d^3 every five steps, product 2 m d^2 at each.
    assert prediction.flops == pytest.approx(
        (2 * 20 * 64 + 8**3 / (3 if planned[0].method.factor else 1)) / 5 + 2 * 3 * 64
    )
    assert prediction.floor == prediction.flops
    assert prediction.sent == 0
    rare = predict(planned, UNIT, update_every=10)
    assert rare.seconds["statistics"] == prediction.seconds["statistics"] / 2
    assert rare.seconds["apply"] == prediction.seconds["apply"]


def test_statistics_read_an_input_and_rearrange_that_of_a_convolution() -> None:
    def more(module: nn.Module, **rates: float) -> float:
        planned = plan(module, 128, solver="lowrank")
        slow, quick = (predict(planned, rates, update_every=1) for rates in (replace(UNIT, **rates), UNIT))
        return slow.seconds["statistics"] - quick.seconds["statistics"]

    linear, conv = nn.Linear(64, 5), nn.Conv1d(64, 5, 3)
    assert more(linear, read=3.0) == more(conv, read=3.0) == 3 * 128 * 64
    assert more(linear, rearranged=0.5) == 0
    assert more(conv, rearranged=0.5) == pytest.approx(2 * 4 * 128 * 64 / 0.5)


def test_on_a_gpu_only_who_is_waited_for_costs_time() -> None:
    planned = plan(nn.Linear(64, 64, bias=False), 128, solver="lowrank", update_every=5, rank=32)
    slow_host, slow_device = replace(UNIT, call=1e12, overlap=True), replace(UNIT, call=1e-12, overlap=True)
    flops = planned[0].cost.apply
    assert predict(planned, replace(slow_host, overlap=False), update_every=5).seconds["apply"] == 16e12 + flops
    assert predict(planned, slow_host, update_every=5).seconds["apply"] == flops
    assert predict(planned, slow_host, update_every=5, host_bound=True).seconds["apply"] == 20.5e12  # recorded
    assert predict(planned, slow_device, update_every=5, host_bound=True).seconds["apply"] == flops


def test_of_a_refresh_that_overlaps_a_gpu_sees_its_own_part_and_a_busy_host_all_but_the_eigenproblems() -> None:
    planned = plan(nn.Linear(64, 64, bias=False), 128, solver="lowrank", update_every=5, rank=32)
    own, slow = planned[0].cost.solve, replace(UNIT, call=1e12, small=1e15)

    def solve(rates: Rates, **options: bool) -> float:
        return predict(planned, rates, update_every=1, **options).seconds["solve"]

    gpu = replace(slow, overlap=True)
    assert solve(gpu, overlap=True) == own
    assert solve(gpu, overlap=True, host_bound=True) == pytest.approx(355e12 + own)
    assert solve(gpu) == solve(gpu, host_bound=True) == solve(slow, overlap=True) == solve(slow)
    assert solve(slow) > 1e15 * (planned[0].method.tracked / TRACKED) ** 2


def test_few_directions_cost_what_the_next_multiple_of_16_does() -> None:
    def apply(rank: int) -> float:
        planned = plan(nn.Linear(64, 64, bias=False), 128, solver="lowrank", rank=rank)
        return predict(planned, UNIT, update_every=10).seconds["apply"]

    assert apply(16) == 4 * 64 * 64 * 16
    assert apply(1) == apply(16)
    assert apply(17) == apply(32) == 2 * apply(16)


@pytest.mark.parametrize(
    "module", [nn.Conv1d(8, 6, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose1d(8, 6, 4)]
)
def test_the_plan_says_which_gradients_are_copied(module: nn.Module) -> None:
    preconditioner = ActivationPreconditioner(module)
    (planned,) = observed(preconditioner)
    (layer,) = preconditioner._stacks[0].layers
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.gradient().zero_()
    assert planned.copies_gradient == bool(layer.weight.grad.all())


def test_llama_has_its_parameters_and_its_costs() -> None:
    model, rows, flops = resolve("llama-3.1-8b", 1000)
    total = sum(parameter.numel() for parameter in model.parameters())
    norms = (2 * 32 + 1) * 4096  # the only parameters that are no matrices
    assert total + norms == 8_030_261_248  # as published with the weights
    assert flops == 6 * 1000 * (total - 128256 * 4096)  # the embedding is a lookup
    narrow, wide = 6 * 32 + 1, 32  # covariances of 4096 and of 14336
    exact = predict(plan(model, rows, solver="exact", ranks=8), H100, update_every=10, ranks=8)
    packed = 1 / 2 + 1 / 8  # of the square, in four panels
    assert exact.held == pytest.approx(4 * (narrow * 4096**2 + wide * 14336**2) * (packed + 1), rel=1e-3)
    low = predict(plan(model, rows, solver="lowrank", ranks=8), H100, update_every=10, ranks=8)
    embedding = 4 * 128256
    assert low.sent == pytest.approx((4 * 48 * (narrow * 4096 + wide * 14336) + embedding) / 10, rel=1e-3)
    assert exact.sent > 100 * low.sent


def test_shards_share_the_product_with_the_gradient_but_not_the_statistics() -> None:
    model, rows, _ = resolve("llama-3.1-8b", 1000)
    whole, shared = (
        predict(plan(model, rows, solver="exact", shards=shards), UNIT, update_every=1) for shards in (1, 8)
    )
    assert shared.seconds["apply"] == pytest.approx(whole.seconds["apply"] / 8, rel=1e-6)
    assert shared.seconds["statistics"] == whole.seconds["statistics"]


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))


def test_any_model_can_be_asked_about(tmp_path: Path) -> None:
    main(["--model", f"{__name__}:make", "--rows", "512", "--ranks", "4", "--rates", "h100", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "prediction.json").read_text())
    assert results["base"]["flops"] == 6 * 512 * (300 * 300 + 300 * 2)
    assert [row["solver"] for row in results["solvers"]] == ["exact", "lowrank", "auto"]
    assert (tmp_path / "prediction.png").exists()


def test_a_prediction_says_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def rates(device: torch.device) -> Rates:
        used.append(torch.get_num_threads())
        return UNIT

    monkeypatch.setattr(elsewhere, "measure_rates", rates)
    main(["--model", "mlp-256", "--threads", "3", "--output", str(tmp_path)])
    assert used == [3]
    assert set(json.loads((tmp_path / "prediction.json").read_text())["rows_per_rank"].values()) == {256}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--models", "mlp-3"], "unknown model 'mlp-3'"),
        (["--batch", "32,x"], "--batch 32,x"),
        (["--tf32"], "--tf32: only GPUs have it"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--model", "mlp-256", "--max-rows", "64"], "--max-rows is for measurements, --model predicts; leave one"),
        (["--model", "mlp-256", "--quick"], "--quick is for measurements"),
        (["--model", "mlp-256", "--compile", "default"], "--compile is for measurements"),
        (["--model", "mlp-256", "--rates", "h100", "--rows", "64"], "--rows: mlp-256 has a batch of its own; leave it"),
        (["--models", "mlp-256", "--shards", "8"], "--shards is for predictions; add --model, or leave it out"),
        (["--model", "mlp-3"], "unknown model 'mlp-3'; choose from llama-3.1-8b, mlp-256, "),
        (["--model", "mlp-3"], "resnet18, or package.module:function"),
        (["--model", "nowhere:make"], "nowhere"),
        (["--model", "math:pi"], "--model math:pi"),
        (["--model", "llama-3.1-8b", "--ranks", "2"], "--rates h100"),
        (["--device", "cuda"], "--device cuda: this machine has no GPU"),
        (["--model", "mlp-256", "--device", "cuda"], "--device cuda: this machine has no GPU"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    options: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=complaint):
        main([*options, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
