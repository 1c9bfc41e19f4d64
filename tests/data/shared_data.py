"""Real data for the tests: `$DOPR_TEST_DATA`, else `shared/data` beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data(name: str) -> Path:
    """A file or folder of the test data. Missing, it skips the test; in CI it fails it, lest nobody notice."""
    default = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("DOPR_TEST_DATA", default)) / name
    if not path.exists():
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"test data {path} is missing; point DOPR_TEST_DATA to the folder that holds {name}")
    return path
