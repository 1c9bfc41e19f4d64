"""Where registered demonstrations are kept."""

from __future__ import annotations

import os
from pathlib import Path


def data_home() -> Path:
    """``$DOPR_HOME``, or ``~/.cache/dopr-lightning``. Not created here."""
    home = os.environ.get("DOPR_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "dopr-lightning"
