"""How do learning rate, weight decay, eps and initial values follow the width? One condition, on spectral norms.

A layer of growing width learns at a steady rate if its weight and each update of it keep ``||W||_2`` and ``||dW||_2``
proportional to ``sqrt(fan_out / fan_in)`` (Yang, Simon and Bernstein 2023, arXiv 2310.17813, Condition 1). What a
learning rate must be multiplied by is therefore what that condition asks for, divided by what the optimizer's own
update does when the matrix grows. With Adam it gives Table 3 of Tensor Programs V (arXiv 2203.03466): the forward pass
holds no multiplier, so nothing in a model has to be remembered for its parametrisation to stay right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

WeightDecayRule = Literal["independent", "coupled", "none"]


@dataclass(frozen=True)
class MatrixGrowth:
    """A parameter as the matrix that an optimizer sees, and how far it has grown beyond its base.

    Args:
        rows: Size of the first dimension.
        cols: Product of the others, kernel taps among them; 1 for a vector.
        row_growth: Rows over those of the base model; 1 where they do not scale.
        col_growth: The same for columns.
        transposed: Whether rows are inputs and columns outputs: embeddings, transposed convolutions.
    """

    rows: int
    cols: int
    row_growth: float
    col_growth: float
    transposed: bool = False

    @property
    def fan_out_growth(self) -> float:
        """Of the layer's outputs."""
        return self.col_growth if self.transposed else self.row_growth

    @property
    def fan_in_growth(self) -> float:
        """Of the layer's inputs."""
        return self.row_growth if self.transposed else self.col_growth


Growth = Callable[[MatrixGrowth, Mapping[str, Any]], float]
"""``growth(matrix, options)``: the spectral norm of an optimizer's update, at a fixed learning rate, over that at the
base width. ``options`` are the algorithm's keywords."""


def sign(matrix: MatrixGrowth, options: Mapping[str, Any]) -> float:
    """Updates with entries of fixed size and a few dominating directions: AdamW, Signum, Lion, SOAP."""
    return math.sqrt(matrix.row_growth * matrix.col_growth)


def gradient(matrix: MatrixGrowth, options: Mapping[str, Any]) -> float:
    """The gradient itself: a sum of outer products of backpropagated errors (norm rows^-1/2) and inputs (cols^1/2).

    Activation preconditioning changes this one in a way that hangs on the data, see docs/mup.md.
    """
    return math.sqrt(matrix.fan_in_growth / matrix.fan_out_growth)


def orthogonal(matrix: MatrixGrowth, options: Mapping[str, Any]) -> float:
    """Orthogonal matrices times torch.optim.Muon's factor, which its ``adjust_lr_fn`` chooses."""
    rows, cols = matrix.rows, matrix.cols

    def factor(a: float, b: float) -> float:
        if options.get("adjust_lr_fn") == "match_rms_adamw":
            return math.sqrt(max(a, b))
        return math.sqrt(a / b if options.get("adjust_lr_fn") == "spectral_unclamped" else max(1.0, a / b))

    return factor(rows, cols) / factor(rows / matrix.row_growth, cols / matrix.col_growth)


def learning_rate(matrix: MatrixGrowth, growth: Growth, options: Mapping[str, Any]) -> float:
    """Multiplier of the base learning rate."""
    return math.sqrt(matrix.fan_out_growth / matrix.fan_in_growth) / growth(matrix, options)


def check_weight_decay_rule(rule: str) -> None:
    """Refuse what is none.

    Raises:
        ValueError: Unknown rule.
    """
    if rule not in get_args(WeightDecayRule):
        raise ValueError(f"unknown weight decay rule {rule!r}; choose from {', '.join(get_args(WeightDecayRule))}")


def weight_decay(lr_multiplier: float, rule: WeightDecayRule) -> float:
    """Multiplier of the weight decay, whose effect in a step is learning rate times weight decay.

    ``"independent"`` keeps that product over widths: weights forget at the same pace (Wang and Aitchison 2024, arXiv
    2405.13698). ``"coupled"`` lets it follow the learning rate. ``"none"``: nothing is decayed.

    Raises:
        ValueError: Unknown rule.
    """
    check_weight_decay_rule(rule)
    return {"independent": 1 / lr_multiplier, "coupled": 1.0, "none": 0.0}[rule]


def eps(matrix: MatrixGrowth) -> float:
    """Multiplier of the eps that an Adam-like update adds to the size of its entries.

    An entry of a gradient falls like 1/rows as layers widen, that of a preconditioned one also like 1/cols at most (the
    damping grows with the trace of the covariance). Without activation preconditioning eps becomes less than it has to
    be, which is the harmless side.
    """
    return 1 / (matrix.row_growth * matrix.col_growth)


def initial_weight(fan_in_growth: float, drawn_growth: float, *, readout: bool) -> float:
    """Multiplier of an initial weight.

    Args:
        fan_in_growth: Of the layer's inputs.
        drawn_growth: Of the dimension n by which the weight was drawn, with a standard deviation like n^-1/2. That is
            the inputs, save for torch's transposed convolutions.
        readout: Whether the outputs do not grow. Then the weight must fall like 1/fan_in, else like fan_in^-1/2.
    """
    return (1 / fan_in_growth if readout else fan_in_growth**-0.5) * math.sqrt(drawn_growth)


def initial_bias(drawn_growth: float) -> float:
    """Multiplier of an initial bias that was drawn like n^-1/2, and must keep its size in the base model."""
    return math.sqrt(drawn_growth)
