"""The wheel is all a user needs: it installs, trains and is typed where the repository is not."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from what git would ship, in a folder of its own: the repository's stays clean, and what is not
    # committed to it cannot help.
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and of this one's packages all but the repository."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    bin_ = folder / "bin"
    subprocess.run([bin_ / "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = (folder / "lib").glob("python3.*/site-packages")
    # A path in a .pth file is searched for modules, but its own .pth files, the editable install's among them, are not
    # read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return bin_


def test_it_holds_what_the_package_reads_at_run_time(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = file.read(metadata).decode()
    configurations = {f"dopr_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "dopr_lightning").rglob("*.py")}
    assert configurations
    assert configurations | modules <= names
    template = [path for path in (ROOT / "template").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {f"dopr_lightning/{path.relative_to(ROOT)}" for path in template} <= names
    assert {"dopr_lightning/py.typed", "dopr_lightning/data/experts/Walker2d-v5.safetensors"} <= names
    assert "License-Expression: MIT" in text
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]


def test_it_trains_where_the_repository_is_not(environment: Path, tmp_path: Path) -> None:
    where = subprocess.run(
        [environment / "python", "-c", "import dopr_lightning; print(dopr_lightning.__file__)"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert Path(where.strip()).is_relative_to(environment.parent)
    steps = ["--trainer.max_steps=60", "--rollout.episodes=0", "--rollout.report_episodes=2"]
    command = [environment / "dopr", "fit", "--config", "walker2d.yaml", "--config", "dopr.yaml", *steps]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads of several processes on few cores wait for each other
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 2 rollouts" in done.stdout


def test_it_makes_projects_where_the_repository_is_not(environment: Path, tmp_path: Path) -> None:
    done = subprocess.run([environment / "dopr", "new", "arm"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "arm" / ".gitignore").is_file()
    assert (tmp_path / "arm" / ".github" / "workflows" / "ci.yml").is_file()
    verbs = subprocess.run(
        [environment / "python", "-m", "arm", "--help"],
        cwd=tmp_path / "arm" / "src",
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "usage: python -m arm VERB" in verbs


def test_its_types_are_seen(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from dopr_lightning import DoPr\n\nreveal_type(DoPr)\nDoPr(damping='strong')\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(environment / "python"), "mine.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert 'Argument "damping" to "DoPr" has incompatible type "str"' in done.stdout, done.stdout
