"""The cookiecutter template makes a project that lints, trains and passes its own tests, or says what to mend."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter

ROOT = Path(__file__).parents[1]

Bake = Callable[..., Path]


@pytest.fixture
def bake(tmp_path: Path) -> Bake:
    settings = tmp_path / "settings.yaml"  # so that nothing is read from, or written to, the home directory
    settings.write_text(f"replay_dir: {tmp_path / 'replay'}\ncookiecutters_dir: {tmp_path / 'cookiecutters'}\n")
    output = tmp_path / "output"

    def run(directory: str | None = "template", **answers: str) -> Path:
        return Path(
            cookiecutter(
                str(ROOT),
                directory=directory,
                no_input=True,
                extra_context=answers,
                output_dir=str(output),
                config_file=str(settings),
            )
        )

    return run


def check(project: Path) -> None:
    files = [path for path in project.rglob("*") if path.is_file()]
    assert len(files) == 9
    for path in files:
        text = f"{path.relative_to(project)}\n{path.read_text()}"
        assert not [mark for mark in ("{{", "}}", "{%", "cookiecutter") if mark in text], path
    for verb in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *verb, "--isolated", "--no-cache"], cwd=project, check=True)


def test_from_the_root_and_in_its_own_words(bake: Bake) -> None:
    project = bake(directory=None)
    check(project)
    assert project.name == "robot-policy"
    assert (project / "src" / "robot_policy" / "module.py").is_file()


def test_answers_end_up_where_they_belong(bake: Bake) -> None:
    project = bake(project_name='Jan\'s "Arm" 2', base_optimizer="sgd", damping="5e-3")
    check(project)
    package = project / "src" / "jan_s_arm_2"
    assert 'base = "sgd"' in (package / "module.py").read_text()
    assert '"dopr.damping": 0.005' in (package / "train.py").read_text()


@pytest.mark.parametrize("base", ["adamw", "muon", "sgd"])
def test_every_base_optimizer(bake: Bake, base: str) -> None:
    project = bake(base_optimizer=base)
    check(project)
    assert f'base = "{base}"' in (project / "src" / "robot_policy" / "module.py").read_text()


def test_its_two_commands(bake: Bake) -> None:
    project = bake(base_optimizer="muon")
    np.savez(project / "demos.npz", observations=np.ones((8, 3)), actions=np.ones((8, 2)))
    make = ["make", "test", "train", f"PYTHON={sys.executable}", "ARGS=--trainer.max_steps 2"]
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(make, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert list(project.glob("lightning_logs/version_0/checkpoints/*step=2.ckpt"))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"project_slug": "My Policy"}, "project_slug must be lowercase letters and digits"),
        ({"package": "class"}, "package must be a lowercase Python identifier, got 'class'"),
        ({"project_name": "Torch"}, "'torch' is a library that the project uses; choose another name"),
        ({"damping": "-1"}, "damping must be a positive number, got '-1'"),
        ({"damping": "strong"}, "damping must be a positive number, got 'strong'"),
    ],
)
def test_bad_answers_are_refused_in_one_line(
    bake: Bake, tmp_path: Path, capfd: pytest.CaptureFixture[str], answers: dict[str, str], message: str
) -> None:
    with pytest.raises(FailedHookException):
        bake(**answers)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list((tmp_path / "output").iterdir())
