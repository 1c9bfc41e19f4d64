"""What every covered weight offers: its identity, its rows, its gradient as a matrix over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopr_lightning.preconditioner.layers.parameters import Location, join, locate
from dopr_lightning.preconditioner.sharding import check_sharding, local, row_offset

ConvCovariance = Literal["channel", "patch"]

Span = tuple[int, int]
"""Rows [start, stop) of a parameter that several layers share, as attention's three projections do."""


def _overrides(cls: type, *names: str, without: str) -> bool:
    """Whether ``cls`` redefines any of ``names`` and not ``without``, whose claim about them may then not hold."""
    for base in cls.__mro__:
        if without in vars(base):
            return False
        if not vars(base).keys().isdisjoint(names):
            return True
    return False


class Layer(ABC):
    r"""One covered weight: perhaps after a rearrangement, its module computes y = W z for many rows z.

    A layer type derives from :class:`MatrixLayer` (or :class:`DiagonalLayer`), sets :attr:`dim` and perhaps
    :attr:`blocks`, and is constructed as ``LayerType(name, module, conv=..., bias=...)``.

    Args:
        name: The module's public name, ``"blocks.2.fc1"``; empty for the model itself.
        module: The module.
        shape: The shape its weight must have.
        weight: The weight as seen from the module.
        bias: The bias as seen from the module, if it is to be the weight of a homogeneous coordinate appended to
            every row (paper, Prop. 4.2: needed for invariance to *affine* maps of the input); None for none. A bias
            that is absent, frozen or computed stays outside.
        weight_span: The rows of the weight that are this layer's, None for all.
        bias_span: The entries of the bias that are this layer's, None for all.

    Attributes:
        kind: The type for a person, ``"linear"``.
        functional: Its input is no argument of its module's forward; a functional linear within it uses the weight.
        part: Tells the layers of one module type apart; None where there is but one.
        submodules: Children of the module whose parameters belong to it since their forward is never called.
        rearranges: Whether the rows are made of the input's entries without arithmetic, so that it may come in any
            dtype, as autocast rounded it for example; others are given it as the module got it, in the statistics'.
        name: The weight's public name, ``"blocks.2.fc1.weight"``, and unique: a span's layer adds its :attr:`part`.
        modules: The modules that feed the weight: one, or several that share it.
        blocks: Number of independent covariances, all of one size.
        dim: Size of one covariance, d_in, with the homogeneous coordinate where there is one.
        pieces: How many consecutive blocks are the diagonal of one larger covariance, and so have one damping.
        homogeneous: Whether there is one.
        key: What is covered: modules that share a weight have layers of equal key.

    Raises:
        NotCoveredError: The weight cannot be covered; says why.
    """

    kind: str
    functional: bool = False
    part: ClassVar[str | None] = None
    submodules: ClassVar[tuple[str, ...]] = ()
    rearranges: bool = False

    name: str
    modules: list[nn.Module]
    blocks: int = 1
    dim: int
    pieces: int = 1
    homogeneous: bool
    key: Hashable

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        shape: tuple[int, ...],
        weight: str = "weight",
        bias: str | None = None,
        weight_span: Span | None = None,
        bias_span: Span | None = None,
    ) -> None:
        self.modules = [module]
        self._prefix = name
        self._weight = locate(module, weight, shape)
        self._bias = None if bias is None else _trainable(module, bias)
        self._weight_span, self._bias_span = weight_span, bias_span
        self.homogeneous = self._bias is not None
        self.name = join(name, self._weight.name) + (f"[{self.part}]" if weight_span else "")
        self.key = id(self.weight), weight_span

    @property
    def weight(self) -> nn.Parameter:
        """The covered parameter, looked up anew since ``load_state_dict(assign=True)`` replaces it."""
        return self._weight.get()

    @property
    def bias(self) -> nn.Parameter:
        """The bias, for layers with :attr:`homogeneous`."""
        assert self._bias is not None
        return self._bias.get()

    @property
    def locations(self) -> list[Location]:
        """Where the weight is, and the bias if it is covered."""
        return [at for at in (self._weight, self._bias) if at is not None]

    @property
    def has_gradient(self) -> bool:
        """Whether there is a gradient to rewrite.

        Raises:
            RuntimeError: There is one of the weight and none of the bias, which are rewritten together.
        """
        if self.weight.grad is None:
            return False
        if self.homogeneous and self.bias.grad is None:
            raise RuntimeError(
                f"{self.name} has a gradient and its bias has none, and they are rewritten together: was the bias "
                "frozen? Build the preconditioner anew, or without bias=True"
            )
        return True

    @property
    def weight_gradient(self) -> Tensor:
        """What is here of the weight's gradient, as it stands; of a span, its rows."""
        return _gradient(self.weight, self._weight_span)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are rewritten, wholly or in a span, by their public names."""
        return {join(self._prefix, at.name): at.get() for at in self.locations}

    @property
    def parameter_names(self) -> list[str]:
        """Public names of the :attr:`parameters`."""
        return [join(self._prefix, at.name) for at in self.locations]

    @property
    def labels(self) -> list[str]:
        """For a person to read, one per parameter; its name, with the :attr:`part` if the layer has but a span."""
        names = self.parameter_names
        return [name + self.name.removeprefix(names[0]) for name in names]

    @property
    def whole_dim(self) -> int:
        """Size of the covariance that the :attr:`pieces` are of."""
        return self.dim

    @property
    def rearrangement(self) -> Hashable:
        """What the rows depend on besides the input, and how the gradient becomes a matrix.

        Of layers with equal ones, one can say the rows of all: a layer type whose modules differ in more than their
        sizes adds what they differ in, as the kernel that a convolution's patches have.
        """
        return type(self), self.blocks, self.dim, self.homogeneous

    @property
    def signature(self) -> Hashable:
        """Of layers with equal :attr:`key`, those with equal ones can be one layer, which counts the rows of all."""
        return self.rearrangement, id(self.bias) if self.homogeneous else None

    def positions(self, mask: Tensor) -> Tensor:
        """A mask of the input's positions in the order of the rows, (n,)."""
        return mask.flatten()

    def grid(self, x: Tensor) -> tuple[int, ...]:
        """The shape of an input's positions, which a mask of it must have: (B, T) for (B, T, d)."""
        return tuple(x.shape[:-1])

    def joins(self, x: Tensor) -> bool:
        """Whether inputs like ``x``, of layers of one ``rearrangement``, may lie one behind the other.

        Along their first dimension; rows must then follow one another likewise in every block. Not unless a layer type
        says so, and one that makes its rows in another way than its base class must say so anew.
        """
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if _overrides(cls, "rows", "vectors", without="joins"):
            cls.joins = Layer.joins  # type: ignore[method-assign]

    def check_sharding(self) -> None:  # noqa: B027 - nothing to refuse by default
        """Raise ValueError if the weight is sharded such that its gradient would have to be gathered."""

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The tensor that a call ``module(*args, **kwargs)`` feeds to the weight: the first, or ``input``."""
        if args:
            return args[0]
        return kwargs.get("input", next((value for value in kwargs.values() if isinstance(value, Tensor)), None))

    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient as a matrix over the rows' coordinates, (blocks, m, dim); of a DTensor its local shard.

        A view of ``.grad`` where the layout allows, so for a plain Linear, else a copy.
        """


class DenseLayer(Layer):
    """A layer with full covariances over explicit rows."""

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """The rows z that the weight multiplies.

        Args:
            x: The layer's :meth:`~Layer.input`; unless the class ``rearranges`` in the dtype the rows are to have.

        Returns:
            (blocks, n, dim), in the order of the flattened leading (or batch and spatial) positions, and in the input's
            dtype or a wider one.
        """

    @abstractmethod
    def write(self, matrix: Tensor) -> None:
        """Put a matrix shaped like :meth:`gradient` back into ``.grad``; free if it is that very view."""


class MatrixLayer(DenseLayer):
    """A dense layer said by three rearrangements: of its input, of its gradient, and the gradient's way back.

    Attributes:
        taps: How many rows of the gradient's matrix belong to one output: they share its bias.
        homogeneous_value: The value of the homogeneous coordinate.
        outputs_first: Whether the weight's first dimension counts outputs and the gradient's matrix goes through them
            in the same order: weights of several layers may then be rearranged one behind the other. Not unless the
            class that says how the gradient becomes a matrix says so.
    """

    taps: int = 1
    homogeneous_value: float = 1.0
    outputs_first: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        ways = "to_matrix", "to_weight", "gradient", "write", "weight_gradient"
        if _overrides(cls, *ways, without="outputs_first"):
            cls.outputs_first = False

    @abstractmethod
    def vectors(self, x: Tensor) -> Tensor:
        """The rows without the homogeneous coordinate, (blocks, n, features)."""

    @abstractmethod
    def to_matrix(self, gradient: Tensor) -> Tensor:
        """The weight's gradient as (blocks, m, features); a view where possible."""

    @abstractmethod
    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`to_matrix` for a gradient of this shape."""

    def check_sharding(self) -> None:
        check_sharding(self.name, self.weight, self.to_matrix)

    def rows(self, x: Tensor) -> Tensor:
        rows = self.vectors(x)
        features = self.dim - self.homogeneous
        if rows.dim() != 3 or (rows.shape[0], rows.shape[2]) != (self.blocks, features):
            raise ValueError(
                f"{self.name}: {type(self).__name__}.vectors made rows of shape {tuple(rows.shape)} where "
                f"(blocks, rows, features) are ({self.blocks}, any, {features}); mend vectors, or blocks and dim"
            )
        if not self.homogeneous:
            return rows
        # At least float32: bfloat16 would round the coordinate of a convolution, 3 ** -0.5 say.
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return F.pad(rows, (0, 1), value=self.homogeneous_value)

    def gradient(self) -> Tensor:
        matrix = self.to_matrix(self.weight_gradient)
        if not self.homogeneous:
            return matrix
        share = _gradient(self.bias, self._bias_span).reshape(self.blocks, -1, 1) * self.homogeneous_value
        return torch.cat([matrix, share.repeat_interleave(self.taps, dim=1)], dim=2)

    def write(self, matrix: Tensor) -> None:
        if self.homogeneous:
            per_tap = matrix[..., -1].unflatten(1, (-1, self.taps))
            _put(_gradient(self.bias, self._bias_span), per_tap.sum(2).flatten() * self.homogeneous_value)
            matrix = matrix[..., :-1]
        gradient = self.weight_gradient
        _put(gradient, self.to_weight(matrix, gradient.shape))


class DiagonalLayer(Layer):
    """A layer with one-hot rows: its covariance is the diagonal of the tokens' frequencies."""

    @abstractmethod
    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which coordinates of the rows are 1.

        Returns:
            The indices, (n,) in int64, and whether each is a row at all, (n,) in bool.
        """

    @abstractmethod
    def scale(self, factors: Tensor) -> None:
        """Multiply the gradient of token i by ``factors[i]``, in place. ``factors`` is (dim,)."""


def _gradient(parameter: nn.Parameter, span: Span | None) -> Tensor:
    """This process' part of the gradient's rows in ``span``; shares the gradient's storage."""
    assert parameter.grad is not None  # the preconditioner leaves layers without a gradient out
    mine = local(parameter.grad)
    if span is None:
        return mine
    offset = row_offset(parameter.grad)
    start, stop = (min(max(edge - offset, 0), len(mine)) for edge in span)
    return mine[start:stop]


def _put(gradient: Tensor, value: Tensor) -> None:
    if value.data_ptr() != gradient.data_ptr():  # else it is the gradient itself, changed in place
        gradient.copy_(value)


def _trainable(module: nn.Module, path: str) -> Location | None:
    """The bias at ``path``, if it is a parameter that is trained."""
    prefix, _, attribute = path.rpartition(".")
    owner = module.get_submodule(prefix)
    bias = owner._parameters.get(attribute)
    return Location(owner, attribute, path, tuple(bias.shape)) if bias is not None and bias.requires_grad else None
