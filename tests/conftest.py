"""What every test finds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

GROUP = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
"""Where Lightning, and torchrun, say who is who in a group of processes."""


def _forget() -> None:
    for name in GROUP:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _a_group_of_its_own() -> Iterator[None]:
    """An earlier test's port is not taken over: it may be in use, and a group that cannot meet waits for ever."""
    _forget()
    yield
    _forget()
