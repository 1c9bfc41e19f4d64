"""Does a model keep its pace as it gets wider? Sizes of activations and updates over widths, and their exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from dopr_lightning.preconditioner import ActivationPreconditioner
from dopr_lightning.preconditioner.layers.parameters import join

Quantity = Literal["initial", "spectral", "entries", "update", "change", "activation"]
"""What is measured, causes before effects.

``initial``: spectral norm of a weight before training, in units of sqrt(fan_out / fan_in).
``spectral``: the same of dW, what training has added to the weight. It knows nothing of the other layers.
``entries``: RMS of the steps of a vector (bias, norm), or of a table that one dimension of grows. Of single steps,
since the few entries of a readout's bias soon come back to where they were.
``update``: RMS of dW x, with x the layer's present input.
``change``: RMS of what training has changed of the layer's outputs.
``activation``: RMS of these outputs.
"""

LABELS: dict[Quantity, str] = {
    "initial": "initial ||W||",
    "spectral": "||dW||",
    "entries": "db",
    "update": "dW x",
    "change": "d outputs",
    "activation": "outputs",
}

OUTPUT = "(output)"
"""What the outermost module that the loss calls returns, among the layers' names."""

TOLERANCE = 0.15
"""Of an exponent. An error of the parametrisation makes one of 1/2 or 1."""

LEVELLING = 0.35
"""Of an exponent over all widths, where that over the wider half is within the tolerance.

What is 0 in the limit of infinite width is reached from narrow models on a curve. An update whose entries have a fixed
size has a part that all rows of the batch agree on, with a norm like the width, and a part on which they do not, with
a norm like its square root; an orthogonal one turns more and more of its directions to those that inputs really have.
The curve is flat where layers are wider than the batch has rows, so a small batch helps. A wrong multiplier bends no
curve: it adds 1/2 to both exponents, and 0.35 is what leaves it no row to hide in, 1/2 less the tolerance.
"""

ROUNDING = 1e-6
"""Of the median parameter's gradient: what is below it at every width is rounding, whose exponent means nothing.

The bias of keys has such a gradient, since softmax is the same for shifted logits: in float32 5e-9 at most was seen.
Adam makes steps of ordinary size of it, as far as eps lets it. Gradients that are meant differ between layers by powers
of the width, which is far from 1e6 at the narrowest.
"""

EXCEPTIONS: dict[str, dict[Quantity, float]] = {
    "adamuon": {"update": -0.4},
    "soap": {"spectral": -0.3, "update": -0.6, "change": -0.4},
}
"""Least exponents that are right for a base optimizer, where they are not those of all.

AdaMuon with ``scale="spectral"``: the response to inputs may fall with the width. Its update is one direction on which
almost all signs agree, and all others lifted to the same size, but for the division entry by entry that follows. The
less there is of the first, the more the matrix looks like random signs, whose direction of greatest norm is none that
inputs have. How much there is hangs on layer and width. So, at a fixed spectral norm (judged as for all), dW x was seen
to fall like width^-0.34, in a transformer's attention. -0.4 is the difference between the exponents of the two kinds,
0.9 and 1/2 (see :class:`~dopr_lightning.optim.adamuon.AdaMuon`).

SOAP: its steps may fall. The norm of its update grows like the width where inputs and errors are new to its eigenbases,
and not at all where they are known. The rate goes by the former, so that nothing grows; what layers see is partly so.
"""

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_MATRICES = (nn.Linear, _ConvNd, *_TABLES)


@dataclass(frozen=True)
class Row:
    """One quantity of one layer.

    Args:
        layer: The module's name; the parameter's, where it is no layer's weight.
        quantity: What was measured.
        values: Per width, the geometric mean over seeds.
        slope: Exponent s of value ~ width^s, by least squares; NaN where there is none.
        tail: The same over the wider half of the widths.
        low: Least exponent that is right.
        high: Greatest.
        note: Why there is no exponent.
        verdict: Whether that is right; None where there is one.
    """

    layer: str
    quantity: Quantity
    values: tuple[float, ...]
    slope: float
    tail: float
    low: float
    high: float
    note: str = ""
    verdict: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether the exponent is right, or that there is none."""
        if self.verdict is not None:
            return self.verdict
        return self.low <= self.slope <= self.high or self.levels_off

    @property
    def levels_off(self) -> bool:
        """Whether the exponent is not right over all widths, but is over the wider half; see :data:`LEVELLING`."""
        inside = self.low <= self.tail <= self.high and abs(self.slope) <= LEVELLING
        return inside and not self.low <= self.slope <= self.high

    @property
    def excess(self) -> float:
        """How far the exponent is beyond its bounds; infinite where a value is no number."""
        if self.passed:
            return 0.0
        return math.inf if math.isnan(self.slope) else max(self.low - self.slope, self.slope - self.high)

    @property
    def diagnosis(self) -> str:
        """What is wrong, and in which direction to look."""
        what = f"{self.layer}: {LABELS[self.quantity]}"
        if self.passed:
            return f"{what} is right"
        if self.note:
            return f"{what}: {self.note}"
        large = "large" if self.slope > self.high else "small"
        cause = {
            "initial": f"its initial values are too {large} with width",
            "spectral": f"its learning rate is too {large} with width",
            "entries": f"its learning rate is too {large} with width",
            "update": f"its learning rate is too {large} with width, or its input is",
        }.get(self.quantity, f"a weight or a learning rate at or before it is too {large} with width")
        return f"{what} grows like width^{self.slope:.2f}: {cause}"


@dataclass(frozen=True)
class CoordinateCheck:
    """What :func:`coordinate_check` found.

    Args:
        widths: Ascending.
        steps: Training steps before the measurement.
        seeds: Of the initial values.
        rows: In the model's order, per quantity.
    """

    widths: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row did."""
        return all(row.passed for row in self.rows)

    def failures(self) -> list[Row]:
        """The rows that did not, causes before effects, of one kind the furthest out first."""
        order = get_args(Quantity)
        wrong = [row for row in self.rows if not row.passed]
        return sorted(wrong, key=lambda row: (order.index(row.quantity), -row.excess))

    def worst(self) -> Row | None:
        """The first of :meth:`failures`, the row to mend; None if all passed."""
        return next(iter(self.failures()), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: what is not finite is null."""
        rows = [
            {key: _plain(value) for key, value in asdict(row).items()} | {"passed": row.passed} for row in self.rows
        ]
        worst = self.worst()
        return {
            "widths": list(self.widths),
            "steps": self.steps,
            "seeds": list(self.seeds),
            "passed": self.passed,
            "worst": worst and worst.diagnosis,
            "rows": rows,
        }


def coordinate_check(
    build: Callable[[int], tuple[nn.Module, Optimizer]],
    loss: Callable[[Any], Tensor],
    widths: Sequence[int],
    *,
    steps: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    dopr: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
    least: Mapping[Quantity, float] | None = None,
) -> CoordinateCheck:
    """Train a few steps at every width, and find how sizes in the model depend on the width: under muP, not at all.

    Every ``Linear``, convolution and embedding is measured, every module that holds parameters of its own, every
    parameter, and what the model returns; see ``Quantity``. The standard deviation of activations alone would not
    do: torch's Muon with ``adjust_lr_fn="match_rms_adamw"`` and no muP passes it for a while, with hidden updates that
    grow like sqrt(width). Nor would the first step: gradients of a network at its initial values do not yet know what
    its later ones know.

    What is judged, at the end of ``steps``: all exponents lie within ``tolerance`` of 0, but for two that may fall,
    since a smaller value does no harm and is what muP asks for: ``initial`` (a readout may begin at 0; how fast muP's
    weights start is not judged twice, as they show in ``activation``), and ``activation`` where the number of outputs
    does not grow (a readout's, and so the network's, begin at size width^-1/2, on top of which training adds what is
    judged as ``change``). What is 0 at every width is right, zero initial values say, but for a parameter that no
    gradient moves. One that the loss does not use, or whose gradient is but rounding (``ROUNDING``), is not judged.

    Args:
        build: Width to a model of that width and its optimizer, without schedule or warm-up. Called under
            ``torch.manual_seed(seed)``.
        loss: The model's training loss on a fixed batch, with fixed noise if any.
        widths: Three or more. A factor of 16 between the first and the last tells sqrt(width) from a constant with
            room to spare.
        steps: Steps of training; 3 to 5 are enough for all weights to have felt each other's first updates.
        seeds: One training each.
        dopr: Options of :class:`~dopr_lightning.ActivationPreconditioner`, which then rewrites gradients before each
            step. None: the optimizer alone.
        tolerance: Of the exponents, 0.15: an error of parametrisation makes one of at least 1/2, finite widths and
            random initial values make up to 0.1.
        least: Exponents of quantities that may fall further than ``tolerance`` allows, see ``EXCEPTIONS``.

    Raises:
        ValueError: Fewer than three widths, no seed or step, or exponents of no quantity; layers that differ between
            widths; nothing that trains.

    Example:
        >>> def build(width):
        ...     model = spec.initialize(factory(width=width))
        ...     return model, make_optimizer(model, "muon", lr=0.01, mup=spec)
        >>> check = coordinate_check(build, lambda model: mse_loss(model(x), y), [64, 256, 1024])  # doctest: +SKIP
        >>> assert check.passed, check.worst()  # doctest: +SKIP
    """
    widths = sorted(set(widths))
    if len(widths) < 3 or widths[0] <= 0:
        raise ValueError(f"an exponent needs at least three different positive widths, got {widths}")
    if steps < 1 or not seeds:
        raise ValueError(f"a coordinate check needs at least one step and one seed, got {steps} and {list(seeds)}")
    if unknown := sorted(set(least or {}) - set(get_args(Quantity))):
        raise ValueError(f"least names {', '.join(unknown)}; quantities are {', '.join(get_args(Quantity))}")
    found = {(width, seed): _train(build, loss, width, seed, steps, dopr) for width in widths for seed in seeds}
    first, *others = found.values()
    if any(other.values.keys() != first.values.keys() for other in others):
        raise ValueError("the models of different widths have different layers; only sizes may depend on the width")
    narrow, wide = found[widths[0], seeds[0]].sizes, found[widths[-1], seeds[0]].sizes
    grown = {name: sum(a != b for a, b in zip(narrow[name], wide[name], strict=True)) for name in narrow}
    rows = []
    for key in first.values:
        layer, quantity = key
        if quantity in ("spectral", "initial") and layer in first.unknown and grown[layer] < 2:
            continue  # a table of some sort, whose columns or rows are vectors: see its entries
        if quantity == "entries" and layer in first.unknown and grown[layer] > 1:
            continue
        fixed_outputs = quantity == "activation" and not grown[_outputs(layer)]
        low = -math.inf if quantity == "initial" or fixed_outputs else (least or {}).get(quantity, -tolerance)
        values = [[found[width, seed].values[key] for seed in seeds] for width in widths]
        gradients = [[found[width, seed].gradients for seed in seeds] for width in widths]
        rows.append(_unless_unmoved(_row(layer, quantity, widths, values, low, tolerance), gradients, steps))
    if not any(row.quantity in ("spectral", "entries") and any(row.values) for row in rows):
        raise ValueError("training moved no parameter; is the learning rate 0, or everything frozen?")
    rows.sort(key=lambda row: get_args(Quantity).index(row.quantity))  # stable: layers stay in the model's order
    return CoordinateCheck(tuple(widths), steps, tuple(seeds), tuple(rows))


def fit_slope(widths: Sequence[float], values: Sequence[float]) -> float:
    """The exponent s of value ~ width^s, by least squares on logarithms; values must be positive."""
    return float(np.polyfit(np.log2(widths), np.log2(values), 1)[0])


def _row(
    layer: str, quantity: Quantity, widths: Sequence[int], values: Sequence[Sequence[float]], low: float, high: float
) -> Row:
    """Values are per width, per seed."""
    means = []
    for at_width in values:
        logs = [math.log(v) if 0 < v < math.inf else -math.inf if v == 0 else math.nan for v in at_width]
        means.append(math.exp(sum(logs) / len(logs)))
    broken = [w for w, mean in zip(widths, means, strict=True) if math.isnan(mean)]
    zero = [w for w, mean in zip(widths, means, strict=True) if mean == 0]
    if broken:
        note = f"diverged at width {broken[0]}; lower the learning rate"
    elif zero:
        note = "0 at every width" if len(zero) == len(widths) else f"0 at width {zero[0]}, and not at others"
    else:
        half = _wider_half(widths)
        slope, tail = fit_slope(widths, means), fit_slope(widths[half:], means[half:])
        return Row(layer, quantity, tuple(means), slope, tail, low, high)
    return Row(layer, quantity, tuple(means), math.nan, math.nan, low, high, note, len(zero) == len(widths))


def _unless_unmoved(row: Row, gradients: Sequence[Sequence[Mapping[str, float]]], steps: int) -> Row:
    """The row; without its exponent where gradients, which are per width, per seed, are 0 or rounding alone."""
    own = [[of.get(row.layer) for of in at_width] for at_width in gradients]
    if row.quantity not in ("spectral", "entries", "update") or any(None in at_width for at_width in own):
        return row
    # Not by the row's values alone: with weight decay, what is dead moves all the same.
    dead = all(0 in at_width for at_width in own)
    if row.quantity != "update" and (dead or not any(row.values)):
        taken = f"{steps} step{'s' * (steps > 1)}"
        note = f"no gradient moved it in {taken}, at any width; it is dead, or behind zeros, which more steps fill"
        return replace(row, slope=math.nan, tail=math.nan, note=note, verdict=False)
    small = (of[row.layer] < ROUNDING * np.median(list(of.values())) for at_width in gradients for of in at_width)
    if not dead and all(small):
        return replace(row, slope=math.nan, tail=math.nan, note="its gradient is rounding; not judged", verdict=True)
    return row


def _wider_half(widths: Sequence[float]) -> int:
    """Index of the first width that is not below the geometric middle; two are left at least."""
    middle = math.sqrt(widths[0] * widths[-1]) * (1 - 1e-9)
    return min(len(widths) - 2, next(index for index, width in enumerate(widths) if width >= middle))


@dataclass(frozen=True)
class _Measured:
    """One training: values; the shapes of parameters and outputs; parameters whose module says nothing of fan-in.

    And, under the names that values have, the RMS of the gradients that the optimizer got, where it got any.
    """

    values: dict[tuple[str, Quantity], float]
    sizes: dict[str, tuple[int, ...]]
    unknown: set[str]
    gradients: dict[str, float]


def _train(
    build: Callable[[int], tuple[nn.Module, Optimizer]],
    loss: Callable[[Any], Tensor],
    width: int,
    seed: int,
    steps: int,
    dopr: Mapping[str, Any] | None,
) -> _Measured:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _measure(*build(width), loss, steps, dopr)


def _measure(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[Any], Tensor],
    steps: int,
    dopr: Mapping[str, Any] | None,
) -> _Measured:
    # What has no entries, a mark of the device say, has no size.
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    calls_before = _calls(model, loss)
    preconditioner = None if dopr is None else ActivationPreconditioner(model, **dopr)
    weights = _weights(model)
    loose = {name: p for name, p in parameters.items() if name not in weights}
    squares = dict.fromkeys(loose, 0.0)
    gradients: dict[str, float] = {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        if preconditioner is not None:
            preconditioner.step()
        for name, p in parameters.items():
            if p.grad is not None:
                label = weights.get(name, name)
                gradients[label] = math.hypot(gradients.get(label, 0.0), _rms([p.grad]) / math.sqrt(steps))
        last = {name: p.detach().clone() for name, p in loose.items()}
        optimizer.step()
        for name, p in loose.items():
            squares[name] += _rms([p.detach() - last[name]]) ** 2
    if preconditioner is not None:
        preconditioner.remove()
    calls = _calls(model, loss)

    values: dict[tuple[str, Quantity], float] = {}
    sizes = {name: tuple(p.shape) for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            layer = weights.get(name)
            label, owner = (name, None) if layer is None else (layer, model.get_submodule(layer))
            if layer is None:
                values[name, "entries"] = math.sqrt(squares[name] / steps)
            if parameter.dim() < 2:
                continue
            change = parameter - before[name]
            values[label, "initial"] = _natural_norm(owner, before[name])
            values[label, "spectral"] = _natural_norm(owner, change)
            if owner is not None and label in calls:
                values[label, "update"] = _rms(_without_bias(owner, change, call) for call in calls[label])
        for name, made in calls.items():
            sizes[_outputs(name)] = tuple(made[0].output.shape)
            values[name, "activation"] = _rms(call.output for call in made)
            values[name, "change"] = _rms(
                now.output - then.output for now, then in zip(made, calls_before[name], strict=True)
            )
    return _Measured(values, sizes, {name for name in loose if loose[name].dim() > 1}, gradients)


def _weights(model: nn.Module) -> dict[str, str]:
    """Parameters that are weights of layers of a known kind, whose inputs and outputs are known, and these layers."""
    return {join(name, "weight"): name for name, module in model.named_modules() if isinstance(module, _MATRICES)}


def _outputs(layer: str) -> str:
    return f"outputs of {layer}"


@dataclass(frozen=True)
class _Call:
    """Of a module: what it got and gave, copied, since what follows may work in place."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _calls(model: nn.Module, loss: Callable[[Any], Tensor]) -> dict[str, list[_Call]]:
    """Those of each module with parameters of its own; and the last of all."""
    calls: dict[str, list[_Call]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor):
                arguments = tuple(map(_copied, args)), {key: _copied(value) for key, value in kwargs.items()}
                calls.setdefault(name, []).append(_Call(*arguments, output.clone()))

        return hook

    def keep_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            calls[OUTPUT] = [_Call((), {}, output.clone())]  # the outermost module returns last

    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    watched = [(name, module) for name, module in model.named_modules() if name and name in owners]
    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in watched]
    handles += [module.register_forward_hook(keep_last) for module in model.modules()]
    modes = {module: module.training for module in model.modules()}  # parts may be in their own, as a frozen norm is
    model.eval()  # dropout would be taken for a change
    try:
        with torch.no_grad():
            loss(model)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return calls


def _without_bias(layer: nn.Module, weight: Tensor, call: _Call) -> Tensor:
    """What the layer gives in a call with this weight and no bias: through its own forward, whatever its kind."""
    replaced = {name: weight if name == "weight" else torch.zeros_like(p) for name, p in layer.named_parameters()}
    return functional_call(layer, replaced, call.args, call.kwargs)


def _natural_norm(owner: nn.Module | None, weight: Tensor) -> float:
    """Spectral norm in units of sqrt(fan_out / fan_in): by how much the RMS of an input can grow at most."""
    if isinstance(owner, (_ConvTransposeNd, *_TABLES)):
        weight = weight.transpose(0, 1)
    matrix = weight.flatten(1)
    if matrix.dtype.itemsize < 4:
        matrix = matrix.float()  # eigenvalues are not to be had in half precision
    rows, columns = matrix.shape
    scale = float(matrix.abs().max())
    if not 0 < scale < math.inf:
        return 0.0 if scale == 0 else math.nan
    matrix = matrix / scale
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    return scale * math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]) * columns / rows)


def _rms(tensors: Any) -> float:
    squares = count = 0.0
    for tensor in tensors:
        squares += float(tensor.double().square().sum())  # in half precision small squares would be 0
        count += tensor.numel()
    return math.sqrt(squares / count)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
