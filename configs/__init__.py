"""The configuration files that come with the package; a path that does not exist is looked for among them."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent


def available() -> list[str]:
    """Names of the files, with folders: ``"walker2d.yaml"``."""
    return sorted(str(path.relative_to(DIRECTORY)) for path in DIRECTORY.rglob("*.yaml"))


def locate(name: str) -> str:
    """``name`` if such a file exists here, else the packaged file of that name, else ``name`` unchanged."""
    packaged = DIRECTORY / name
    return str(packaged) if not Path(name).exists() and packaged.is_file() else name
