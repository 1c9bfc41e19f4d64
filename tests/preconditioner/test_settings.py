"""Every setting against a closed form in float64: masks, rows, sizes, averages, failures, dtypes, what is left out."""

from __future__ import annotations

import copy
import logging
import math
import re
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from same import assert_same
from torch import Tensor, nn

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner.stack import spread

GAMMA = 0.1

SOLVERS: list[dict[str, Any]] = [
    {"n": 20},
    {"n": 20, "update_every": 50},
    {"n": 20, "ema": 0.5},
    {"n": 2},
    {"n": 20, "solver": "lowrank", "max_error": 1e-9},
    {"n": 20, "solver": "lowrank", "max_error": 1e-9, "ema": 0.5},
]
"""By rows: Woodbury's where they are few. With factors where refreshes are rare."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def covariance(rows: Tensor) -> Tensor:
    return rows.mT @ rows / len(rows)


def rewritten(gradient: Tensor, sigma: Tensor, gamma: float = GAMMA) -> Tensor:
    return gradient @ torch.linalg.inv(sigma + gamma * sigma.trace() * torch.eye(len(sigma), dtype=sigma.dtype))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, ap: ActivationPreconditioner, loss: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients before and after."""
    model.zero_grad()
    loss.backward()
    before = gradients(model)
    ap.step()
    return before, gradients(model)


def rows(ap: ActivationPreconditioner) -> dict[str, int | None]:
    return {row.parameter: row.rows for row in ap.summary() if row.covered}


# Masks

LENGTHS = (7, 3, 5)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
"""Which of (3, 7) positions are no padding."""


@pytest.mark.parametrize(
    ("kind", "solver"), [*product(["linear", "conv1d", "blocks"], ["exact", "lowrank"]), ("wide", "exact")]
)
def test_nan_in_padding_does_not_reach_the_inverse(kind: str, solver: str) -> None:
    """More than twice as wide as there are rows is Woodbury's case."""
    d = 60 if kind == "wide" else 12
    x = torch.where(MASK[..., None], draw(0, 3, 7, d), torch.nan)
    model = (nn.Conv1d(d, 4, 1) if kind == "conv1d" else nn.Linear(d, 4)).double()
    ap = ActivationPreconditioner(
        model, damping=GAMMA, solver=solver, max_error=1e-9, max_dim=6 if kind == "blocks" else None
    )
    with ap.mask(MASK):
        y = model(x.mT).mT if kind == "conv1d" else model(x)
    y[MASK].sum().backward()
    gradient = draw(1, 4, d)
    model.weight.grad = gradient.view_as(model.weight).clone()  # the layer's own is NaN: 0 * NaN
    ap.step()
    assert rows(ap) == {"weight": 15}
    piece = torch.arange(d) // (6 if kind == "blocks" else d)
    expected = rewritten(gradient, covariance(x[MASK]) * (piece == piece[:, None]))
    torch.testing.assert_close(model.weight.grad.view_as(gradient), expected, rtol=1e-6, atol=1e-8)


class Attention(nn.Module):
    """Embedded tokens, among which padding is hidden as keys."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.readout = nn.Linear(6, 3)
        self.double()

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """(B, T) or, where not ``batch_first``, (T, B)."""
        x = self.embedding(tokens)
        return self.readout(self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_masked_batch_equals_its_samples_without_padding(batch_first: bool) -> None:
    """Embedding, attention's four weights and a Linear behind it; the padding is a token like any other."""
    tokens = torch.randint(9, MASK.shape, generator=torch.Generator().manual_seed(0))
    results = []
    for padded in (True, False):
        model = Attention(batch_first)
        ap = ActivationPreconditioner(model, damping=GAMMA, solver="exact")
        if padded:
            mask = MASK if batch_first else MASK.T
            with ap.mask(mask):
                y = model(tokens if batch_first else tokens.T, ~MASK)
            y[mask].square().sum().backward()
        else:
            for length, sample in zip(LENGTHS, tokens, strict=True):
                sample = sample[:length, None]
                sample, hidden = (sample.T if batch_first else sample), torch.zeros(1, length, dtype=torch.bool)
                model(sample, hidden).square().sum().backward()
        ap.step()
        assert set(rows(ap).values()) == {sum(LENGTHS)}
        results.append(gradients(model))
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, rtol=1e-8, atol=1e-8, msg=name)


def test_a_layer_that_sees_other_positions_than_the_mask_counts_all_of_its_rows() -> None:
    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 2)]).double()
    ap = ActivationPreconditioner(model)
    with ap.mask(MASK):
        model[1](torch.tanh(model[0](draw(0, 3, 7, 6))).mean(1)).sum().backward()
    ap.step()
    assert rows(ap) == {"0.weight": 15, "1.weight": 3}


@pytest.mark.parametrize(
    ("model", "shape", "positions"),
    [
        (nn.Linear(6, 4), (7, 3, 6), (7, 3)),
        (nn.Linear(12, 4), (7, 3, 12), (7, 3)),
        (nn.Embedding(9, 4), (7, 3), (7, 3)),
        (nn.Conv1d(6, 4, 1), (7, 6, 3), (7, 3)),
        (nn.ConvTranspose2d(6, 4, 1, bias=False), (6, 7, 3), (7, 3)),
        (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), (7, 3, 6), (7, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_mask_of_another_order_is_refused_with_both_shapes(
    model: nn.Module, shape: tuple[int, ...], positions: tuple[int, int]
) -> None:
    """As many positions, so that nothing else would tell."""
    x = torch.randint(9, shape) if isinstance(model, nn.Embedding) else torch.randn(*shape)
    ap = ActivationPreconditioner(model, max_dim=6)
    with ap.mask(MASK):
        y = model(x)
    with pytest.raises(ValueError, match=r"weight.*: the mask's shape is \(3, 7\).* \(7, 3\); transpose the mask"):
        y.sum().backward()
    ap.discard()
    for mask in (MASK.T, MASK.T.flatten(), MASK.T.reshape(21, 1)):  # of the input's shape, or by its rows
        model.zero_grad()
        with ap.mask(mask):
            model(x).sum().backward()
        ap.step()
        assert set(rows(ap).values()) == {15}


def test_a_mask_that_is_not_boolean_is_refused_when_it_is_given() -> None:
    ap = ActivationPreconditioner(nn.Linear(6, 4))
    with pytest.raises(TypeError, match=r"mask must be a boolean tensor.*, got torch\.int64; write mask\.bool\(\)"):
        ap.mask(MASK.long())


def test_a_mask_that_fits_no_layer_in_a_step_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def warnings(*masks: Tensor) -> list[str]:
        caplog.clear()
        for mask in masks:
            with ap.mask(mask):
                model[1](torch.tanh(model[0](draw(0, 3, 7, 6))).mean(1)).sum().backward()
        ap.step()
        model.zero_grad()
        return [record.getMessage() for record in caplog.records]

    model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 2)]).double()
    ap = ActivationPreconditioner(model)
    assert not warnings(MASK)
    assert not warnings(MASK[:, 1:], MASK)
    (message,) = warnings(MASK[:, 1:])
    assert "the mask of shape (3, 6) fits the input of no covered layer" in message
    assert not warnings(MASK[:, 1:])


# Rows and sizes


@pytest.mark.parametrize("limit", [10, 16, 24, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_max_rows_takes_evenly_spread_rows_of_each_input(limit: int, masked: bool) -> None:
    model, parts = mlp(5, 3), (draw(0, 24, 5), draw(1, 24, 5))
    keep = torch.arange(24) % 5 != 4 if masked else torch.ones(24, dtype=torch.bool)
    ap = ActivationPreconditioner(model, damping=GAMMA, max_rows=limit)
    for x in parts:
        with ap.mask(keep):
            model(x).square().sum().backward()
    before = gradients(model)
    ap.step()
    some = spread(24, limit) if limit < 24 else torch.arange(24)
    used = torch.cat([x[some][keep[some]] for x in parts])
    assert rows(ap) == {"0.weight": len(used)}
    torch.testing.assert_close(model[0].weight.grad, rewritten(before["0.weight"], covariance(used)))


@pytest.mark.parametrize(("grid", "limit"), [((64, 256), 2048), ((64, 84, 84), 16384), ((5, 7), 34)])
def test_rows_are_spread_along_every_axis(grid: tuple[int, ...], limit: int) -> None:
    """Every 28th row of images 84 wide would be of three columns."""
    rows = math.prod(grid)
    some = spread(rows, limit)
    assert torch.equal(some * limit // rows, torch.arange(limit))  # of every stretch one
    for size, place in zip(grid, torch.unravel_index(some, grid), strict=True):
        share = torch.bincount(place, minlength=size) * size / limit
        assert share.min() > 0.4
        assert share.max() < 1.6


@pytest.mark.parametrize("scale", ["trace", "mean"])
@pytest.mark.parametrize(
    ("d", "max_dim", "size"), [(12, 12, 12), (12, 11, 6), (12, 6, 6), (12, 5, 4), (12, 1, 1), (7, 4, 4)]
)
def test_max_dim_splits_a_covariance_into_the_fewest_equal_blocks(d: int, max_dim: int, size: int, scale: Any) -> None:
    """With the damping of the whole covariance; 7 into 4 and 3, which are padded, is a covariance of 7."""
    x, model = draw(0, 40, d), mlp(d, 3)
    ap = ActivationPreconditioner(model, damping=GAMMA, damping_scale=scale, max_dim=max_dim)
    before, after = step(model, ap, model(x).square().sum())
    gamma = GAMMA / d if scale == "mean" else GAMMA
    piece = torch.arange(d) // size
    expected = rewritten(before["0.weight"], covariance(x) * (piece == piece[:, None]), gamma)
    torch.testing.assert_close(after["0.weight"], expected)
    assert ap.summary()[0].d_in == size


def apart(seed: int, n: int, sizes: list[int], scales: list[float]) -> Tensor:
    """Rows with entries in one piece each, so that their covariance is exactly block-diagonal; as many for each."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    x = torch.zeros(n, ends[-1], dtype=torch.double)
    for index, (end, size, factor) in enumerate(zip(ends, sizes, scales, strict=True)):
        rows = x[index :: len(sizes)]
        rows[:, end - size : end] = factor * draw(seed + index, len(rows), size)
    return x


@pytest.mark.parametrize("scale", ["trace", "mean"])
@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [1.0, 1e-2, 10.0], [1.0, 0.0, 1e-200]])
@pytest.mark.parametrize("options", SOLVERS)
def test_pieces_give_what_the_whole_layer_gives_where_its_covariance_is_block_diagonal(
    options: dict[str, Any], scales: list[float], scale: Any
) -> None:
    """Also pieces that are 0, or nothing beside the others. A second layer is as large as a piece, and stays whole."""
    options = dict(options)
    n, d, ema = options.pop("n"), 23, options.get("ema", 0.0)
    model = nn.ModuleDict({"split": nn.Linear(d, 3, bias=False), "whole": nn.Linear(8, 3, bias=False)}).double()
    ap = ActivationPreconditioner(model, damping=GAMMA, damping_scale=scale, max_dim=8, **options)
    ap.update_every = 1
    averages: dict[str, Tensor] = {}
    weight = 0.0
    for now in range(4):
        inputs = {"split": apart(3 * now, n, [8, 8, 7], scales), "whole": draw(now, n, 8)}
        weight = ema * weight + 1 - ema
        model.zero_grad()
        for name, x in inputs.items():
            model[name](x).sum().backward()
            model[name].weight.grad = draw(now, 3, x.shape[1])
        ap.step()
        for name, x in inputs.items():
            averages[name] = averages.get(name, covariance(x)).lerp(covariance(x), (1 - ema) / weight)
            gamma = GAMMA / x.shape[1] if scale == "mean" else GAMMA
            expected = rewritten(draw(now, 3, x.shape[1]), averages[name], gamma)
            torch.testing.assert_close(model[name].weight.grad, expected, rtol=1e-5, atol=1e-6)
    assert len(ap._stacks) == 1
    assert {row.failures for row in ap.summary()} == {0}
    assert {row.solver for row in ap.summary()} == {{2: "woodbury"}.get(n, options.get("solver", "exact"))}


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
def test_groups_of_a_convolution_keep_a_damping_of_their_own(solver: Any) -> None:
    conv = nn.Conv1d(14, 4, 1, groups=2, bias=False).double()
    ap = ActivationPreconditioner(conv, damping=GAMMA, max_dim=4, solver=solver, max_error=1e-9)
    x = torch.cat([draw(0, 30, 7), 1e3 * draw(1, 30, 7)], 1)
    conv(x.T[None]).square().sum().backward()
    before = conv.weight.grad[..., 0].clone()
    ap.step()
    piece = torch.arange(7) // 4
    for group, rows in enumerate(x.split(7, 1)):
        part = slice(2 * group, 2 * group + 2)
        expected = rewritten(before[part], covariance(rows) * (piece == piece[:, None]))
        torch.testing.assert_close(conv.weight.grad[part, :, 0], expected, rtol=1e-6, atol=1e-12)


# Averages over refreshes


def test_ema_of_a_diagonal_covariance_is_bias_corrected() -> None:
    ema, model = 0.8, nn.Embedding(6, 3).double()
    ap = ActivationPreconditioner(model, damping=GAMMA, ema=ema)
    counts = []
    for now in range(4):
        tokens = torch.randint(now + 2, (5, 4), generator=torch.Generator().manual_seed(now))
        counts.append(torch.bincount(tokens.flatten(), minlength=6).double() / 20)
        before, after = step(model, ap, model(tokens).square().sum())
        weights = [ema ** (now - s) for s in range(now + 1)]
        frequencies = sum(w * c for w, c in zip(weights, counts, strict=True)) / sum(weights)
        torch.testing.assert_close(after["weight"], before["weight"] / (frequencies + GAMMA)[:, None])


def test_a_layer_that_skips_refreshes_keeps_its_own_bias_correction() -> None:
    """Its average is over the refreshes that it took part in."""
    ema = 0.6
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False)}).double()
    ap = ActivationPreconditioner(model, damping=GAMMA, ema=ema)
    seen = []
    for now in range(5):
        x = draw(now, 9, 4)
        loss = model["a"](x).square().sum()
        if now in (1, 4):
            seen.append(x)
            loss = loss + model["b"](x).square().sum()
        before, after = step(model, ap, loss)
    mean = (ema * covariance(seen[0]) + covariance(seen[1])) / (ema + 1)
    torch.testing.assert_close(after["b.weight"], rewritten(before["b.weight"], mean))


# Between refreshes


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
def test_a_layer_first_used_between_refreshes_has_an_inverse_at_the_very_next_step(solver: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 3, bias=False), "b": nn.Linear(6, 3, bias=False)}).double()
    ap = ActivationPreconditioner(model, damping=GAMMA, update_every=10, solver=solver, max_error=1e-9)
    refreshed = []
    for now in range(8):
        refreshed.append(ap.collecting)
        x = draw(now, 9, 6)
        loss = model["a"](x).square().sum()
        if now >= 5:
            loss = loss + model["b"](x).square().sum()
        before, after = step(model, ap, loss)
        if now == 5:  # no row of it was captured yet: its gradient stays as it is
            assert torch.equal(after["b.weight"], before["b.weight"])
        if now >= 6:
            expected = rewritten(before["b.weight"], covariance(draw(6, 9, 6)))
            torch.testing.assert_close(after["b.weight"], expected, rtol=1e-5, atol=1e-7)
    warm_up = [True, True, True] if solver == "lowrank" else [True, False, False]
    assert refreshed == [*warm_up, False, False, False, True, False]


def test_an_early_refresh_survives_a_resume() -> None:
    def run(now: range, state: dict | None) -> tuple[list[dict[str, Tensor]], dict]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)}).double()
        ap = ActivationPreconditioner(model, update_every=10)
        if state is not None:
            ap.load_state_dict(state)
        results = []
        for n in now:
            x = draw(n, 9, 6)
            loss = model["a"](x).square().sum() + (model["b"](x).square().sum() if n >= 2 else 0)
            results.append(step(model, ap, loss)[1])
        return results, copy.deepcopy(ap.state_dict())

    whole, _ = run(range(5), None)
    first, state = run(range(3), None)  # at step 2 the layer was used, and waits for step 3
    second, _ = run(range(3, 5), state)
    for expected, found in zip(whole, first + second, strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)


# Failures


def poisoned_steps(
    ap: ActivationPreconditioner, model: nn.Module, x: Tensor, count: int, gradient: Tensor
) -> list[Tensor]:
    """Rewrites of one gradient after backwards through ``x``."""
    results = []
    for _ in range(count):
        model(x).sum().backward()
        model.zero_grad()
        model[0].weight.grad = gradient.clone()
        ap.step()
        results.append(model[0].weight.grad.clone())
        model.zero_grad()
    return results


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.5}, {"solver": "lowrank", "max_error": 1e-9}, {"solver": "exact", "n": 2}]
)
def test_statistics_that_are_not_finite_keep_the_last_good_inverse(value: float, options: dict) -> None:
    """1e300 is finite, but not its square. Two rows of eight coordinates are Woodbury's case."""
    options = dict(options)
    n = options.pop("n", 20)
    model, x, gradient = mlp(8, 3), draw(0, n, 8), draw(1, 3, 8)
    ap = ActivationPreconditioner(model, damping=GAMMA, **options)
    step(model, ap, model(x).square().sum())
    bad = x.clone()
    bad[0, 2] = value
    expected = rewritten(gradient, covariance(x))
    for found in poisoned_steps(ap, model, bad, 2, gradient):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (row,) = (row for row in ap.summary() if row.covered)
    assert row.failures == 2
    # The next good refresh is as if the bad ones had never been.
    (found,) = poisoned_steps(ap, model, x, 1, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert ap.summary()[0].failures == 2


@pytest.mark.parametrize(("options", "n"), [({}, 64), ({"update_every": 50}, 64), ({}, 2), ({"solver": "lowrank"}, 64)])
def test_an_inverse_beyond_the_largest_number_is_a_failure(options: dict, n: int) -> None:
    """Factors, inverses, Woodbury's form and directions: 1 / lambda is no float32 where inputs are 1e-19."""
    model = mlp(8, 3).float()
    ap = ActivationPreconditioner(model, damping=1e-3, **options)
    gradient = draw(1, 3, 8).float()
    (found,) = poisoned_steps(ap, model, 1e-19 * draw(0, n, 8).float(), 1, gradient)
    assert torch.equal(found, gradient)
    assert ap.summary()[0].failures == 1


def test_a_failed_factorisation_keeps_the_last_good_inverse_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In fp32, damping of 1e-12 cannot make rank 1 positive definite."""
    model = mlp(8, 3).float()
    ap = ActivationPreconditioner(model, damping=1e-12, solver="exact")
    step(model, ap, model(draw(0, 50, 8).float()).square().sum())
    good = poisoned_steps(ap, model, draw(0, 50, 8).float(), 1, draw(1, 3, 8).float())[0]
    flat = (1e3 * draw(2, 50, 1) @ draw(3, 1, 8)).float()
    with caplog.at_level(logging.WARNING):
        found = poisoned_steps(ap, model, flat, 3, draw(1, 3, 8).float())
    assert all(torch.equal(good, other) for other in found)
    assert [record.getMessage() for record in caplog.records] == [
        "0.weight: covariance is not positive definite, raise the damping (rows 50); kept the inverse of step 1"
    ]
    assert ap.summary()[0].failures == 3


@pytest.mark.parametrize("options", [{"solver": "exact"}, {"solver": "lowrank"}, {"damping_scale": "mean"}])
@pytest.mark.parametrize("n", [4, 64])
def test_a_damping_that_overflows_is_to_be_lowered(options: dict, n: int, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(8, 3).float()
    ap = ActivationPreconditioner(model, damping=3e38, **options)
    poisoned_steps(ap, model, 10 * draw(0, n, 8).float(), 1, draw(1, 3, 8).float())
    assert [record.getMessage() for record in caplog.records] == [
        f"0.weight: covariance overflows with its damping, lower the damping (rows {n}); left the gradient as it was"
    ]


def test_a_first_refresh_that_fails_leaves_the_gradient_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for options in ({}, {"solver": "lowrank"}, {"solver": "exact", "ema": 0.5}):
        caplog.clear()
        model = mlp(8, 3)
        ap = ActivationPreconditioner(model, **options)
        (found,) = poisoned_steps(ap, model, torch.full((3, 8), torch.nan, dtype=torch.double), 1, draw(1, 3, 8))
        assert torch.equal(found, draw(1, 3, 8))
        (record,) = caplog.records
        assert "has NaN or infinity (rows 3); left the gradient as it was" in record.getMessage()


def test_a_bad_layer_does_not_disturb_its_neighbours_in_one_batched_call() -> None:
    model = nn.ModuleList(nn.Linear(5, 4, bias=False) for _ in range(3)).double()
    ap = ActivationPreconditioner(model, damping=GAMMA)
    inputs = [draw(i, 20, 5) for i in range(3)]
    inputs[1][0] = torch.nan
    for layer, x in zip(model, inputs, strict=True):
        layer(x).sum().backward()
    for layer in model:
        layer.weight.grad = draw(9, 4, 5)
    ap.step()
    for i in (0, 2):
        torch.testing.assert_close(model[i].weight.grad, rewritten(draw(9, 4, 5), covariance(inputs[i])))
    assert torch.equal(model[1].weight.grad, draw(9, 4, 5))


@pytest.mark.parametrize("options", [{}, {"solver": "lowrank"}])
def test_too_many_failures_in_a_row_are_an_error_that_names_the_layer(options: dict) -> None:
    model, bad = mlp(8, 3), torch.full((4, 8), torch.inf, dtype=torch.double)
    ap = ActivationPreconditioner(model, max_failures=3, **options)
    for _ in range(2):  # a success in between starts the count anew
        poisoned_steps(ap, model, bad, 2, draw(1, 3, 8))
        poisoned_steps(ap, model, draw(0, 20, 8), 1, draw(1, 3, 8))
    poisoned_steps(ap, model, bad, 2, draw(1, 3, 8))
    with pytest.raises(RuntimeError, match=r"^0\.weight: covariance has NaN .* 3 refreshes in a row\..*max_failures"):
        poisoned_steps(ap, model, bad, 1, draw(1, 3, 8))


@pytest.mark.parametrize("options", SOLVERS)
def test_inputs_of_zero_are_told_once_and_never_end_the_training(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = dict(options)
    n = options.pop("n")
    model, gradient, zeros = mlp(8, 3), draw(1, 3, 8), torch.zeros(n, 8, dtype=torch.double)
    ap = ActivationPreconditioner(model, damping=GAMMA, max_failures=2, **options)
    ap.update_every = 1
    for found in poisoned_steps(ap, model, zeros, 4, gradient):
        assert torch.equal(found, gradient)
    assert [record.getMessage() for record in caplog.records] == [
        f"0.weight: covariance is zero, every input of the layer was 0 (rows {n}); left the gradient as it was"
    ]
    assert ap.summary()[0].condition_number is None
    expected = rewritten(gradient, covariance(draw(0, n, 8)))
    for x in (draw(0, n, 8), zeros):  # an inverse once there is one, which then stays
        for found in poisoned_steps(ap, model, x, 3, gradient):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(caplog.records) == 1


def test_a_layer_that_was_told_of_zeros_is_told_of_nan(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(8, 3)
    ap = ActivationPreconditioner(model, max_failures=9)
    for value in (0, torch.nan, 0, torch.nan, torch.nan):
        poisoned_steps(ap, model, torch.full((4, 8), value, dtype=torch.double), 1, draw(1, 3, 8))
    assert [message.split(" (rows")[0] for message in caplog.messages] == [
        "0.weight: covariance is zero, every input of the layer was 0",
        "0.weight: covariance has NaN or infinity",
    ]


def test_zeros_in_between_do_not_excuse_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    model, bad = mlp(8, 3), torch.full((4, 8), torch.nan, dtype=torch.double)
    ap = ActivationPreconditioner(model, max_failures=2)
    for x in (bad, torch.zeros_like(bad), torch.zeros_like(bad)):
        poisoned_steps(ap, model, x, 1, draw(1, 3, 8))
    with pytest.raises(RuntimeError, match=r"has NaN or infinity .* 2 refreshes in a row"):
        poisoned_steps(ap, model, bad, 1, draw(1, 3, 8))


@pytest.mark.parametrize("options", SOLVERS)
@pytest.mark.parametrize("kind", ["depthwise", "grouped"])
def test_one_group_of_zeros_does_not_cost_the_others_their_inverses(
    kind: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is dead at first, comes to life, and dies again."""
    options = dict(options)
    n, size = options.pop("n"), 1 if kind == "depthwise" else 6
    if n == 2 and kind == "depthwise":
        pytest.skip("no fewer rows than half of one dimension")
    ema = options.get("ema", 0.0)
    conv = nn.Conv1d(3 * size, 6, 1, groups=3, bias=False).double()
    ap = ActivationPreconditioner(nn.Sequential(conv), damping=GAMMA, max_failures=2, **options)
    ap.update_every = 1
    averages: list[Tensor | None] = [None] * 3
    weights = [0.0] * 3
    for now in range(12):
        rows = draw(now, n - now % 2, 3 * size)
        dead = not 4 <= now < 8
        rows[:, size : 2 * size] *= not dead
        conv.zero_grad()
        conv(rows.T[None]).square().sum().backward()
        real = conv.weight.grad[..., 0].clone()
        # Not its own, which is 0: what is kept shows in another.
        gradient = draw(50 + now, 6, size)
        conv.weight.grad = gradient[..., None].clone()
        ap.step()
        found = conv.weight.grad[..., 0]
        assert found.isfinite().all()
        for group in range(3):
            part = slice(2 * group, 2 * group + 2)
            if group != 1 or not dead:
                weights[group] = ema * weights[group] + 1 - ema
                sigma, past = covariance(rows[:, size * group : size * (group + 1)]), averages[group]
                averages[group] = sigma if past is None else past.lerp(sigma, (1 - ema) / weights[group])
            else:
                assert not real[part].any()
            of = averages[group]
            expected = gradient[part] if of is None else rewritten(gradient[part], of)
            torch.testing.assert_close(found[part], expected, rtol=1e-5, atol=1e-6)
        row = ap.summary()[0]
        assert row.failures == 0
        assert row.effective_rank is not None
        assert math.isfinite(row.effective_rank)
        if options.get("solver") == "lowrank":
            assert row.error is not None
            assert row.error < 1e-9
    assert not caplog.records
    ap.remove()
    resumed = ActivationPreconditioner(nn.Sequential(conv), damping=GAMMA, **options)
    resumed.load_state_dict(ap.state_dict())
    assert_same(resumed.state_dict(), ap.state_dict())
    assert resumed.summary()[0].error == row.error


@pytest.mark.parametrize("how", ["eval", "functional"])
def test_a_covered_layer_that_is_never_captured_while_its_gradient_moves_is_an_error_with_the_reason(how: str) -> None:
    model, x = mlp(5, 4, 3), draw(0, 9, 5)
    ap = ActivationPreconditioner(model)
    if how == "eval":
        model[2].eval()
        loss = model(x).sum()
    else:
        loss = nn.functional.linear(torch.tanh(model[0](x)), model[2].weight).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"^2\.weight: has a gradient, but .*(eval mode|functional call)"):
        ap.step()


def test_what_is_known_of_a_gradient_without_rows_is_said() -> None:
    def said() -> str:
        with pytest.raises(
            RuntimeError, match=r"^0\.weight: has a gradient, but its module's inputs were not seen"
        ) as error:
            ap.step()
        ap.remove()
        model.zero_grad()
        return str(error.value)

    model, x = mlp(5, 3), draw(0, 9, 5)
    model(x).sum().backward()
    ap = ActivationPreconditioner(model)
    assert "before the preconditioner was made" in said()
    ap = ActivationPreconditioner(model)
    torch.func.vmap(model)(x).sum().backward()
    assert "torch.func" in said()
    ap = ActivationPreconditioner(model)
    model(x).sum().backward()
    ap.step()
    assert "a second step() after one backward, without zero_grad()" in said()
    ap = ActivationPreconditioner(model)
    with ap.mask(torch.zeros(9, dtype=torch.bool)):
        model(x).sum().backward()
    assert "Did the mask leave all of its rows out?" in said()
    ap = ActivationPreconditioner(model.eval())
    model(x).sum().backward()
    assert "eval mode" in said()


@pytest.mark.parametrize("overlap", [False, True])
def test_all_layers_without_rows_are_named_at_once_in_the_models_order(overlap: bool) -> None:
    """As torchvision's Swin has them, which uses the weights of two layers per block functionally."""
    model, x = mlp(5, 7, 4, 6, 3, 2, 4, 5, 3), draw(0, 9, 5)
    ap = ActivationPreconditioner(model, update_every=4, overlap=overlap, solver="exact")
    for _ in range(4):
        model(x).sum().backward()
        ap.step()
        model.zero_grad()
    model.eval()(x).sum().backward()
    others = ", ".join(f"{i}.weight" for i in (2, 4, 6, 8, 10))
    if overlap:
        ap.step()  # begins the refresh that the next one ends
    message = f"^0.weight: has a gradient, .* not seen, nor those of {others}, 2 more. It is in eval mode"
    with pytest.raises(RuntimeError, match=message):
        ap.step()


def test_rows_that_a_functional_use_adds_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """The layer is captured too, so only the audit can tell: its covariance is of other rows than its gradient."""
    model = nn.ModuleList([nn.Linear(4, 4, bias=False)]).double()
    ap = ActivationPreconditioner(model)
    for now in range(3):
        h = model[0](draw(now, 20, 4))
        step(model, ap, nn.functional.linear(3 * torch.sin(h), model[0].weight).square().sum())
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "0.weight: its gradient is not explained by the inputs of its module"
    ]


# What is left out, and copies


def test_include_and_exclude_are_globs_on_whole_names() -> None:
    model = nn.ModuleDict({"m": nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(12)), "n": nn.Linear(2, 2)})

    def covered(**options: list[str]) -> set[str]:
        return {row.parameter for row in ActivationPreconditioner(model, **options).summary() if row.covered}

    every = {f"m.{i}.weight" for i in range(12)} | {"n.weight"}
    assert covered(exclude=["m.1"]) == every - {"m.1.weight"}
    assert covered(exclude=["m.1?"]) == every - {"m.10.weight", "m.11.weight"}
    assert covered(exclude=["m*"]) == {"n.weight"}
    assert covered(exclude=["m.1", "n"]) == every - {"m.1.weight", "n.weight"}
    assert covered(include=["m.1", "n"]) == {"m.1.weight", "n.weight"}
    assert covered(include=["m.*"], exclude=["m.1*"]) == every - {
        "n.weight",
        "m.1.weight",
        "m.10.weight",
        "m.11.weight",
    }


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("encodr.*", "; did you mean 'encoder.*'?"),
        ("Head", "; did you mean 'head'?"),
        ("head.*", ": these are names of modules, not of parameters; did you mean 'head'?"),
        ("encoder.1.*", "; did you mean 'encoder.*'?"),
        ("encoder", "; did you mean 'encoder.*'?"),
        ("head.weight", ": these are names of modules, not of parameters; did you mean 'head'?"),
        ("*.bias", ": these are names of modules, not of parameters"),
        ("somewhere.else", ""),
    ],
)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_a_guess(option: str, pattern: str, said: str) -> None:
    encoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(4, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    expected = f"{option}: {pattern!r} matches no module with parameters in ModuleDict{said}"
    for some in (None, list(model["head"].parameters())):  # for one of several optimizers, the same
        with pytest.raises(ValueError, match=re.escape(expected) + "$"):
            ActivationPreconditioner(model, parameters=some, **{option: ["head", pattern]})
        # Those of another optimizer, frozen ones and norms are there.
        ActivationPreconditioner(model, parameters=some, exclude=["encoder.0", "frozen", "encoder.2"])


def test_frozen_and_excluded_layers_cost_nothing() -> None:
    """No hook, no statistics, and so nothing to send; their gradients pass through."""
    model = mlp(5, 4, 4, 3)
    model[0].requires_grad_(False)
    ap = ActivationPreconditioner(model, exclude=["2"])
    before, after = step(model, ap, model(draw(0, 9, 5)).square().sum())
    assert not model[0]._forward_hooks
    assert not model[2]._forward_hooks
    assert model[4]._forward_hooks
    assert sum(stack.blocks for stack in ap._stacks) == 1
    assert list(ap.state_dict()["layers"]) == ["4.weight"]
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not torch.equal(after["4.weight"], before["4.weight"])
    assert "0.weight" not in after


def test_parameters_of_another_optimizer_are_left_alone() -> None:
    model = mlp(5, 4, 3)
    ap = ActivationPreconditioner(model, damping=GAMMA, parameters=list(model[2].parameters()))
    before, after = step(model, ap, model(draw(0, 9, 5)).square().sum())
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert rows(ap) == {"2.weight": 9}
    reasons = {row.parameter: row.reason for row in ap.summary()}
    assert reasons["0.weight"] == reasons["0.bias"] == "its weight is not among the optimizer's parameters"


@pytest.mark.parametrize("options", [{}, {"ema": 0.5}, {"solver": "lowrank"}, {"update_every": 2}])
def test_weights_that_load_state_dict_assigns_are_rewritten(options: dict) -> None:
    """``assign=True`` puts other Parameter objects into the modules."""
    results = []
    for assign in (False, True):
        model = mlp(5, 4, 3)
        ap = ActivationPreconditioner(model, damping=GAMMA, **options)
        for now in range(4):
            if now == 1:
                old = model[0].weight
                model.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
                assert (model[0].weight is not old) == assign
            results.append(step(model, ap, model(draw(now, 9, 5)).square().sum())[1])
    for expected, found in zip(results[:4], results[4:], strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_copies_and_averages_of_the_model_carry_no_live_hook() -> None:
    model = mlp(5, 4, 3)
    ap = ActivationPreconditioner(model, damping=GAMMA)
    x = draw(0, 9, 5)
    twin = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    model(x).square().sum().backward()
    assert model(x).grad_fn.name() != "AddmmBackward0"  # the node that counts is the last one
    for other in (twin, average):
        assert other.train()(x).grad_fn.name() == "AddmmBackward0"
        other.train()(draw(1, 7, 5)).square().sum().backward()  # as in training it would count
    before = gradients(model)
    ap.step()
    assert set(rows(ap).values()) == {9}
    expected = rewritten(before["0.weight"], covariance(x))
    torch.testing.assert_close(model[0].weight.grad, expected)
    # A twin has a preconditioner of its own, which the first one does not notice.
    other_ap = ActivationPreconditioner(twin)
    step(twin, other_ap, twin(draw(1, 7, 5)).sum())
    assert set(rows(other_ap).values()) == {7}
    assert set(rows(ap).values()) == {9}


def test_a_pickled_model_comes_back_without_hooks_that_work(tmp_path: object) -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model)
    torch.save(model, f"{tmp_path}/model.pt")
    twin = torch.load(f"{tmp_path}/model.pt", weights_only=False)
    twin(draw(1, 7, 5)).sum().backward()
    step(model, ap, model(draw(0, 9, 5)).sum())
    assert rows(ap) == {"0.weight": 9}


def test_no_grad_validation_rollouts_and_target_networks_are_not_counted() -> None:
    """As they come in reinforcement learning, between and around the training forward of one step."""
    model, x = mlp(5, 4, 3), draw(0, 9, 5)
    ap = ActivationPreconditioner(model, damping=GAMMA)
    with torch.no_grad():
        model(draw(1, 8, 5))  # a rollout
        target = model(draw(2, 7, 5))  # a target network that shares the weights
    with torch.inference_mode():
        model(draw(3, 6, 5))
    model.eval()
    model(draw(4, 5, 5)).sum().backward()  # a saliency map, whose gradient is thrown away
    model.train()
    model.zero_grad()
    loss = (model(x) - target.mean()).square().sum()
    model(draw(5, 4, 5))  # a graph that is never walked back
    loss.backward()
    before = gradients(model)
    ap.step()
    assert set(rows(ap).values()) == {9}
    torch.testing.assert_close(model[0].weight.grad, rewritten(before["0.weight"], covariance(x)))


# Dtypes


@pytest.mark.parametrize("options", [{"solver": "exact"}, {"solver": "lowrank"}, {"ema": 0.5}])
def test_a_model_that_is_converted_after_a_step_is_refused_by_name(options: dict) -> None:
    model = mlp(12, 3).float()
    ap = ActivationPreconditioner(model, **options)
    step(model, ap, model(draw(0, 9, 12).float()).square().sum())
    loss = model.double()(draw(1, 9, 12)).square().sum()
    said = r"^0\.weight: statistics are in torch.float32 on cpu and would now be in torch.float64 on cpu; make a new"
    with pytest.raises(RuntimeError, match=said):
        loss.backward()
    ap.remove()
    step(model, ActivationPreconditioner(model, **options), model(draw(1, 9, 12)).square().sum())


def test_a_float64_submodule_keeps_its_precision_beside_float32() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.single = nn.Linear(5, 5, bias=False)
            self.double_ = nn.Linear(5, 5, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.double_(torch.tanh(self.single(x)).double())

    model, x = Mixed(), draw(0, 20, 5).float()
    ap = ActivationPreconditioner(model, damping=1e-6)
    before, after = step(model, ap, model(x).square().sum())
    h = torch.tanh(model.single(x)).double().detach()
    expected = rewritten(before["double_.weight"], covariance(h), 1e-6)
    torch.testing.assert_close(after["double_.weight"], expected, rtol=1e-9, atol=1e-9)
    expected = rewritten(before["single.weight"].double(), covariance(x.double()), 1e-6)
    torch.testing.assert_close(after["single.weight"], expected.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
@pytest.mark.parametrize("n", [3, 200])
def test_bfloat16_weights_have_float32_statistics(solver: str, n: int) -> None:
    """Rounding M once costs 2^-9 relative; bf16 statistics would be off by more than a tenth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4, bias=False)).bfloat16()
    x = (draw(0, n, 16) * torch.logspace(0, -1.5, 16)).bfloat16()
    ap = ActivationPreconditioner(model, damping=1e-3, solver=solver, max_error=1e-6)
    before, after = step(model, ap, model(x).square().sum())
    assert after["0.weight"].dtype == torch.bfloat16
    expected = rewritten(before["0.weight"].double(), covariance(x.double()), 1e-3)
    assert (after["0.weight"].double() - expected).norm() <= 2**-8 * expected.norm()


def test_discard_forgets_the_window() -> None:
    """The state is that of a run without the batch, also where the batch would have changed the solver."""
    for options in ({}, {"ema": 0.5}, {"solver": "lowrank"}, {"update_every": 2}):
        results = []
        for skipped in (False, True):
            model = mlp(12, 3)
            ap = ActivationPreconditioner(model, damping=GAMMA, **options)
            for now in range(4):
                if skipped:
                    bad = draw(9, 4, 12)
                    bad[0] = torch.inf
                    model(bad).square().sum().backward()
                    ap.discard()
                found = step(model, ap, model(draw(now, 5, 12)).square().sum())[1]
            results.append((found["0.weight"], ap.state_dict()))
        assert torch.equal(results[0][0], results[1][0])
        assert_same(results[1][1], results[0][1])


# Summary


def table_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    model[2].requires_grad_(False)
    return model


@pytest.mark.parametrize("solver", ["exact", "lowrank", "auto"])
def test_the_summary_has_each_parameter_once_in_the_models_order(solver: str) -> None:
    model = table_model()
    ap = ActivationPreconditioner(model, solver=solver, exclude=["4"])
    assert [row.parameter for row in ap.summary()] == [name for name, _ in model.named_parameters()]
    step(model, ap, model(draw(0, 9, 6)).square().sum())
    summary = ap.summary()
    assert [row.parameter for row in summary] == [name for name, _ in model.named_parameters()]
    by_name = {row.parameter: row for row in summary}
    assert by_name["1.weight"].reason == "LayerNorm is not a layer type with an activation covariance"
    assert by_name["2.weight"].reason == "the weight is frozen (requires_grad=False)"
    assert by_name["4.weight"].reason == by_name["4.bias"].reason == "4 matches an exclude pattern"
    assert "bias=False" in by_name["0.bias"].reason
    assert [row.parameter for row in summary if row.covered] == ["0.weight"]
    assert (by_name["0.weight"].kind, by_name["0.weight"].d_in, by_name["0.weight"].rows) == ("linear", 6, 9)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_appears_once_per_parameter(bias: bool) -> None:
    """Though its packed weight has three covariances."""
    model = nn.MultiheadAttention(6, 2, batch_first=True).double()
    ap = ActivationPreconditioner(model, bias=bias)
    x = draw(0, 3, 5, 6)
    model(x, draw(1, 3, 5, 6), draw(2, 3, 5, 6), need_weights=False)[0].square().sum().backward()
    ap.step(measure=True)
    names = [row.parameter for row in ap.summary()]
    assert len(set(names)) == len(names)
    assert {name.partition("[")[0] for name in names} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{"solver": "exact"}, {"solver": "lowrank"}, {"solver": "exact", "max_dim": 3}, {"bias": True}]
)
def test_measured_cosine_and_rms_are_those_of_the_gradients(options: dict) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"e": nn.Embedding(7, 6), "c": nn.Conv1d(6, 8, 3, groups=2), "l": nn.Linear(8, 3), "u": nn.Linear(3, 3)}
    ).double()
    ap = ActivationPreconditioner(model, damping=GAMMA, **options)
    tokens = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0))
    model["l"](torch.tanh(model["c"](model["e"](tokens).mT)).mean(-1)).square().sum().backward()
    before = gradients(model)
    ap.step(measure=True)
    after = gradients(model)
    for row in ap.summary():
        if not row.covered or row.parameter.startswith("u."):
            assert row.cosine is None
            continue
        g, m = (grads[row.parameter].flatten() for grads in (before, after))
        assert row.cosine == pytest.approx(float(nn.functional.cosine_similarity(g, m, dim=0)), rel=1e-6)
        assert row.cosine < 0.9999
        # Coordinates that only fill a block up are not of the gradient.
        assert row.update_rms == pytest.approx(float(m.square().mean().sqrt()), rel=1e-6)
    # Measured where asked for only; the last measurement stays.
    model.zero_grad()
    model["u"](draw(0, 4, 3)).sum().backward()
    ap.step()
    assert {row.parameter for row in ap.summary() if row.cosine is not None} >= {"e.weight", "c.weight", "l.weight"}


def test_the_table_shows_every_row_under_its_head() -> None:
    model = table_model()
    ap = ActivationPreconditioner(model, solver="exact")
    model(draw(0, 9, 6)).square().sum().backward()
    ap.step(measure=True)
    summary = ap.summary()
    head, *lines = str(summary).splitlines()
    assert len(lines) == len(summary)
    assert [line.split()[0] for line in lines] == [row.parameter for row in summary]
    first = summary[0]
    assert first.condition_number is not None
    for title, text in {
        "kind": "linear",
        "solver": "exact",
        "d_in": "6",
        "rows": "9",
        "condition": f"{first.condition_number:.3g}",
        "cos(M, G)": f"{first.cosine:.3g}",
        "RMS of M": f"{first.update_rms:.3g}",
        "failures": "0",
        "rank": "-",
    }.items():
        at = head.index(f"  {title}") + 2
        assert lines[0][at:].split()[0] == text, title
    assert lines[3].endswith("LayerNorm is not a layer type with an activation covariance")


def test_the_summary_is_of_the_last_refresh_whenever_it_is_asked_for() -> None:
    """Before the first, after a failed one, in an open window, after a resume: nothing raises, nothing is made up."""
    model, x = mlp(6, 3), draw(0, 30, 6)
    eigenvalues = torch.linalg.eigvalsh(covariance(x))
    expected = float(eigenvalues[-1] / eigenvalues[0])
    ap = ActivationPreconditioner(model, solver="exact", update_every=2)
    assert ap.summary()[0].condition_number is None
    step(model, ap, model(x).square().sum())
    assert ap.summary()[0].condition_number == pytest.approx(expected)
    resumed = ActivationPreconditioner(mlp(6, 3), solver="exact", update_every=2)
    resumed.load_state_dict(ap.state_dict())
    assert resumed.summary()[0].condition_number in (None, pytest.approx(expected))
    ap.step()
    model(draw(1, 4, 6)).sum().backward()
    assert ap.summary()[0].condition_number in (None, pytest.approx(expected))
    model(torch.full((4, 6), torch.nan, dtype=torch.double)).sum().backward()
    model.zero_grad()
    ap.step()
    assert ap.summary()[0].condition_number in (None, pytest.approx(expected))
    assert ap.summary()[0].failures == 1
