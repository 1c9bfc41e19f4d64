"""Projects from the template: what can be answered, and how to make one in a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "template"
CHOICES: dict[str, list[Any]] = {
    key: asked if isinstance(asked, list) else [True, False]
    for key, asked in json.loads((TEMPLATE / "cookiecutter.json").read_text()).items()
    if isinstance(asked, list | bool)
}


def possible(answers: dict[str, Any]) -> bool:
    """Whether answers go together."""
    return (answers["base"], answers["trainer"]) != ("soap", "fsdp2")


def bake(folder: Path, template: str = str(ROOT), directory: str | None = "template", **answers: Any) -> Path:
    """What ``cookiecutter TEMPLATE --no-input`` makes in ``folder``; nothing is read from, or left in, the home."""
    from cookiecutter.main import cookiecutter

    settings = folder / "settings.yaml"
    settings.write_text(f"replay_dir: {folder / 'replay'}\ncookiecutters_dir: {folder / 'cookiecutters'}\n")
    output = folder / "output"
    made = cookiecutter(
        template,
        directory=directory,
        no_input=True,
        extra_context=answers,
        output_dir=str(output),
        config_file=str(settings),
    )
    return Path(made)


def run(project: Path, *command: str, **environment: str) -> str:
    """What a command of Python's says in a project, as if that were installed; it must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout
