"""Are two states the same, bit for bit, whatever is nested in them?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same(found: Any, expected: Any, name: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(found[key], value, f"{name}/{key}")
    elif isinstance(expected, list):
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{name}/{index}")
    else:
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected, name
