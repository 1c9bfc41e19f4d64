"""The multipliers: the published tables in closed form, and the spectral condition on what optimizers really do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dopr_lightning.mup import MatrixGrowth, rules
from dopr_lightning.mup.rules import gradient, orthogonal, sign
from dopr_lightning.optim.muon import Muon

M = 4.0
"""Growth of every dimension that grows, but for OUT and IN where they grow unequally."""
OUT, IN = 4.0, 16.0

ORIGINAL = {"adjust_lr_fn": "original"}
MATCHED = {"adjust_lr_fn": "match_rms_adamw"}
UNCLAMPED = {"adjust_lr_fn": "spectral_unclamped"}

LAYERS = {
    # Outputs first; the readout has fewer rows than columns, the input more.
    "input": MatrixGrowth(64, 5, M, 1),
    "hidden": MatrixGrowth(64, 64, M, M),
    "unequal": MatrixGrowth(64, 512, OUT, IN),
    "readout": MatrixGrowth(3, 64, 1, M),
    "vector": MatrixGrowth(64, 1, M, 1),
    "output bias": MatrixGrowth(3, 1, 1, 1),
    "embedding": MatrixGrowth(11, 64, 1, M, transposed=True),
    # Kernels are matrices of channels x (channels * 3), torch's transposed ones inputs first.
    "conv": MatrixGrowth(64, 512 * 3, OUT, IN),
    "conv readout": MatrixGrowth(3, 64 * 3, 1, M),
    "transposed conv": MatrixGrowth(512, 64 * 3, IN, OUT, transposed=True),
    "transposed conv readout": MatrixGrowth(64, 3 * 3, M, 1, transposed=True),
    "transposed conv input": MatrixGrowth(5, 64 * 3, 1, M, transposed=True),
    "depthwise conv": MatrixGrowth(64, 3, M, 1),
}

# ../shared/anchors/mup.md with mup's readout, f = W x / m, replaced by W' = W / m. A step of Adam on W changes W' by
# 1/m of it: multiplier 1/m. SGD's gradient of W is 1/m of that of W': m becomes m / m^2. Muon's likewise: spectral
# m / m = 1 on W', times what torch's factor misses of it.
SGD = {
    "input": M,
    "hidden": 1,
    "unequal": OUT / IN,
    "readout": 1 / M,
    "vector": M,
    "output bias": 1,
    "embedding": M,
    "conv": OUT / IN,
    "conv readout": 1 / M,
    "transposed conv": OUT / IN,
    "transposed conv readout": 1 / M,
    "transposed conv input": M,
    "depthwise conv": M,
}
ADAM = {
    "input": 1,
    "hidden": 1 / M,
    "unequal": 1 / IN,
    "readout": 1 / M,
    "vector": 1,
    "output bias": 1,
    "embedding": 1,
    "conv": 1 / IN,
    "conv readout": 1 / M,
    "transposed conv": 1 / IN,
    "transposed conv readout": 1 / M,
    "transposed conv input": 1,
    "depthwise conv": 1,
}
SPECTRAL = {"input": 1, "hidden": 1, "unequal": 1, "readout": 1}
# sqrt(max(1, A/B)) is sqrt(A/B) for tall matrices, and 1 for wide ones, which should shrink like m_in^-1/2.
CLAMPED = {"input": 1, "hidden": 1, "unequal": (OUT / IN) ** 0.5, "readout": M**-0.5, "conv": (OUT / IN) ** 0.5}
# Divided by sqrt(max(A, B)), which is that of the columns where these are more.
MATCH = {"input": 1, "hidden": M**-0.5, "unequal": OUT**0.5 / IN, "readout": 1 / M, "conv": OUT**0.5 / IN}


@pytest.mark.parametrize(
    ("growth", "options", "table"),
    [
        (gradient, {}, SGD),
        (sign, {}, ADAM),
        (orthogonal, UNCLAMPED, SPECTRAL),
        (orthogonal, ORIGINAL, CLAMPED),
        (orthogonal, {}, CLAMPED),
        (orthogonal, MATCHED, MATCH),
    ],
    ids=["sgd", "adam", "muon spectral", "muon original", "muon", "muon matched"],
)
def test_learning_rates_are_those_of_the_literature(
    growth: rules.Growth, options: dict[str, str], table: dict[str, float]
) -> None:
    found = {name: rules.learning_rate(LAYERS[name], growth, options) for name in table}
    assert found == pytest.approx(table)


@pytest.mark.parametrize("growth", [gradient, sign, orthogonal])
def test_nothing_changes_at_the_base_width(growth: rules.Growth) -> None:
    assert rules.learning_rate(MatrixGrowth(3, 7, 1, 1), growth, {}) == 1
    assert rules.eps(MatrixGrowth(3, 7, 1, 1)) == 1


def low_rank(rows: int, cols: int, fan_out_growth: float) -> Tensor:
    """The gradient of a batch of four: errors fall like 1/fan_out, inputs keep their size."""
    generator = torch.Generator().manual_seed(rows * cols)
    errors = torch.randn(rows, 4, generator=generator, dtype=torch.float64) / fan_out_growth
    return errors @ torch.randn(4, cols, generator=generator, dtype=torch.float64)


def update(algorithm: Callable[..., torch.optim.Optimizer], at: Tensor, **options: object) -> Tensor:
    weight = nn.Parameter(torch.zeros_like(at))
    weight.grad = at
    optimizer = algorithm([weight], lr=1.0, weight_decay=0.0, **options)
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("algorithm", "growth", "options"),
    [
        (torch.optim.AdamW, sign, {"eps": 1e-30}),
        (torch.optim.SGD, gradient, {}),
        (Muon, orthogonal, ORIGINAL),
        (Muon, orthogonal, MATCHED),
        (Muon, orthogonal, UNCLAMPED),
    ],
)
@pytest.mark.parametrize("out_grows", [True, False])
@pytest.mark.parametrize("in_grows", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_multiplied_update_keeps_the_spectral_condition(
    algorithm: Callable[..., torch.optim.Optimizer],
    growth: rules.Growth,
    options: dict[str, str],
    out_grows: bool,
    in_grows: bool,
    transposed: bool,
) -> None:
    """``||dW||_2 ~ sqrt(fan_out / fan_in)`` for the step that torch takes, in every role, over x8."""
    sizes = []
    for m in (1, 2, 4, 8):
        fan_out, fan_in = 48 * (m if out_grows else 1), 32 * (m if in_grows else 1)
        rows, cols = (fan_in, fan_out) if transposed else (fan_out, fan_in)
        grown = [
            float(m) if grows else 1.0 for grows in ((in_grows, out_grows) if transposed else (out_grows, in_grows))
        ]
        matrix = MatrixGrowth(rows, cols, *grown, transposed=transposed)
        at = low_rank(fan_out, fan_in, m if out_grows else 1)
        step = update(algorithm, at.T.contiguous() if transposed else at, **options)
        multiplied = rules.learning_rate(matrix, growth, options) * torch.linalg.matrix_norm(step, 2).item()
        sizes.append(math.log2(multiplied / math.sqrt(fan_out / fan_in)))
    slope = sum(x * (y - sum(sizes) / 4) for x, y in zip((-1.5, -0.5, 0.5, 1.5), sizes, strict=True)) / 5
    assert abs(slope) < 0.1
    assert max(sizes) - min(sizes) < 0.35  # a factor of 1.27; a wrong power of m is 2.8 or more


def test_weight_decay_and_learning_rate_together() -> None:
    """What a step takes off a weight, and what it takes off where nothing is said of the width."""
    for lr in (0.125, 1.0, 8.0):
        assert lr * rules.weight_decay(lr, "independent") == 1
        assert lr * rules.weight_decay(lr, "coupled") == lr
        assert rules.weight_decay(lr, "none") == 0
    with pytest.raises(ValueError, match="unknown weight decay rule 'half'; choose from independent, coupled, none"):
        rules.weight_decay(1.0, "half")  # type: ignore[arg-type]


def test_eps_falls_as_fast_as_a_preconditioned_gradient_may() -> None:
    """1/rows of the gradient times 1/cols of the inverse covariance, whichever of them are outputs."""
    expected = {
        "input": 1 / M,
        "hidden": 1 / M**2,
        "unequal": 1 / (OUT * IN),
        "readout": 1 / M,
        "vector": 1 / M,
        "output bias": 1,
        "embedding": 1 / M,
        "transposed conv": 1 / (OUT * IN),
        "depthwise conv": 1 / M,
    }
    assert {name: rules.eps(LAYERS[name]) for name in expected} == expected


@pytest.mark.parametrize("fan_in", [1, 2, 16])
@pytest.mark.parametrize("drawn", [1, 3, 16])
def test_initial_values(fan_in: int, drawn: int) -> None:
    """With what was drawn, like drawn^-1/2, the multiplier gives the size that the role asks for."""
    as_drawn = drawn**-0.5
    assert as_drawn * rules.initial_weight(fan_in, drawn, readout=False) == pytest.approx(fan_in**-0.5)
    assert as_drawn * rules.initial_weight(fan_in, drawn, readout=True) == pytest.approx(1 / fan_in)
    assert as_drawn * rules.initial_bias(drawn) == pytest.approx(1)
