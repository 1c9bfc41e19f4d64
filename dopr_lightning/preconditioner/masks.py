"""Did the masks of a step fit any layer?"""

from __future__ import annotations

from logging import getLogger

from torch import Tensor

log = getLogger(__name__)


class Masks:
    """What layers made of the masks since the last step.

    Attributes:
        fitted: Whether one did.
    """

    def __init__(self) -> None:
        self._warned = False
        self._shape: tuple[int, ...] | None = None
        self.fitted = False

    def note(self, mask: Tensor, fits: bool) -> None:
        """A layer's rows were counted under a mask, which had as many positions or had not."""
        self._shape = tuple(mask.shape)
        self.fitted |= fits

    def report(self) -> None:
        """Say once that they fitted none, and forget them."""
        if self._shape is not None and not self.fitted and not self._warned:
            self._warned = True
            log.warning(
                "the mask of shape %s fits the input of no covered layer, so all rows count, padding too; it must have "
                "the shape of the inputs' positions, (B, T) for (B, T, d)",
                self._shape,
            )
        self.clear()

    def clear(self) -> None:
        """Forget them."""
        self._shape, self.fitted = None, False
