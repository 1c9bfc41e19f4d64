"""Did the masks of a step fit any layer?"""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger

from torch import Tensor

log = getLogger(__name__)


class Masks:
    """Remembers whether a mask has fitted a layer since the last step.

    Attributes:
        fitted: Whether one has.
        shared: All that are given the same masks, itself included; a mask need only fit a layer of one of them.
    """

    def __init__(self) -> None:
        self.shared: Sequence[Masks] = (self,)
        self.fitted = False
        self._shape: tuple[int, ...] | None = None
        self._last: tuple[tuple[int, ...] | None, bool] | None = None  # shape and fitted, before the last report
        self._warned = False

    def note(self, mask: Tensor, fits: bool) -> None:
        """A layer's rows were counted under a mask, which had as many positions or had not."""
        self._shape = tuple(mask.shape)
        self.fitted |= fits

    def report(self) -> None:
        """Warn once if they fitted none, and forget them. Until all that share them have reported, one may fit yet."""
        self._last = self._shape, self.fitted
        last = [masks._last for masks in self.shared if masks._last is not None]
        shape = next((shape for shape, _ in last if shape is not None), None)
        fit = len(last) < len(self.shared) or any(fitted for _, fitted in last)
        if shape is not None and not fit and not any(masks._warned for masks in self.shared):
            self._warned = True
            log.warning(
                "the mask of shape %s fits the input of no covered layer, so all rows count, padding too; it must have "
                "the shape of the inputs' positions, (B, T) for (B, T, d)",
                shape,
            )
        self.clear()

    def clear(self) -> None:
        """Forget them."""
        self._shape, self.fitted = None, False
