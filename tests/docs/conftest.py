"""What tests that run a page's code share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from dopr_lightning.optim import BASES


@pytest.fixture
def forgotten(tmp_path: Path) -> Iterator[None]:
    """Modules in the test's folder, and the bases they registered, are forgotten afterwards."""
    with patch.dict(BASES):
        yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
