"""A project's own policy and data are what every verb trains, in every process that a verb starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from toy_project import Data, Policy, Regresses
from toy_task import CONFIG

from dopr_lightning.cli import main
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.training import resolve

OWN = Project(Policy, Data, command="toy")
ARGUMENTS = [f"--config={CONFIG}", "--model.weight=0.5", "--rollout.episodes=0"]
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, program: Sequence[str] = ("-m", "toy_project")) -> str:
    paths = os.pathsep.join(str(Path(__file__).parent / folder) for folder in ("rollout", "data"))
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkpoint(path: Path) -> dict[str, float]:
    loaded = torch.load(path, weights_only=True)
    assert loaded["hyper_parameters"]["weight"] == loaded["weight"]
    return {key: loaded[key] for key in ("weight", "world", "global_step")}


def test_fit_on_two_processes_and_resumed(here: Path) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=6"]
    common = ["fit", *ARGUMENTS, *two, f"--checkpoint.dirpath={here}"]
    run(*common, "--trainer.max_steps=4")
    assert checkpoint(here / "last.ckpt") == {"weight": 0.5, "world": 2, "global_step": 4}
    said = run(*common, "--trainer.max_steps=8", f"--ckpt_path={here / 'last.ckpt'}")
    assert checkpoint(here / "last.ckpt") == {"weight": 0.5, "world": 2, "global_step": 8}
    assert re.search(r"reported: held-out loss \S+, return \S+ in \d+ rollouts", said)
    policy = Policy.load_from_checkpoint(here / "last.ckpt")
    assert policy.weight == 0.5


SCRIPT = """
import sys
from pathlib import Path
import torch.distributed as dist
from dopr_lightning.cli import main
from dopr_lightning.project import Project
from toy_project import Data, Policy
end, ended = dist.destroy_process_group, []
dist.destroy_process_group = lambda: ended.append(dist.is_initialized()) or end()
assert main(sys.argv[1:], Project(Policy, Data, command="toy")) == 0
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print("ended:", ended, "left:", dist.is_initialized(), [name for name in threads if "gloo" in name])
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_no_process_group_is_left_to_the_interpreters_end(here: Path, strategy: str) -> None:
    """In a process of its own: one that has had a group must not fork, as other tests do."""
    (here / "script.py").write_text(SCRIPT)
    one = [f"--config=trainer/{strategy}.yaml", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    one += ["--trainer.max_steps=4", "--trainer.logger=false", f"--checkpoint.dirpath={here}"]
    said = run("fit", *ARGUMENTS, *one, program=[str(here / "script.py")])
    assert "ended: [True] left: False []" in said


def test_compare_trains_it_in_worker_processes(here: Path) -> None:
    run("compare", *ARGUMENTS, "--optimizers=adamw,sgd", "--seeds=0", "--episodes=1", "--workers=2", "--output=out")
    for name in ("adamw", "sgd"):
        assert checkpoint(here / f"out/runs/{name}/seed-0/checkpoints/last.ckpt")["weight"] == 0.5
        settings = json.loads((here / f"out/runs/{name}/seed-0/settings.json").read_text())
        assert settings["config"]["classes"] == {"policy": "toy_project.Policy", "data": "toy_project.Data"}


def test_sweep_and_the_run_it_recommends(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ["--widths=16,32", "--lr-octaves=0.5", "--seeds=0", "--parametrizations=mup", "--output=out", "--workers=1"]
    assert main(["sweep", *ARGUMENTS, *sweep], OWN) == 0
    assert (here / "out/recommended.yaml").read_text().startswith("# toy fit --config")
    fit = ["fit", "--trainer.logger=false", f"--checkpoint.dirpath={here}", "--mup.from_sweep=out"]
    assert main([*fit, *ARGUMENTS], OWN) == 0
    assert checkpoint(here / "last.ckpt")["weight"] == 0.5
    capsys.readouterr()
    # A loss weighted otherwise, or the library's policy, is another thing than what was swept.
    assert main([*fit, *ARGUMENTS, "--model.weight=2"], OWN) == 2
    assert "model.weight: 0.5 -> 2.0" in capsys.readouterr().err
    assert main([*fit, f"--config={CONFIG}"]) == 2
    assert "classes.policy: toy_project.Policy -> unset" in capsys.readouterr().err


def test_coordinate_check_measures_it(here: Path) -> None:
    check = ["--optimizers=adamw", "--widths=16,32,64,128", "--seeds=0", "--steps=2", "--output=out", "--tolerance=9"]
    assert main(["coord-check", *ARGUMENTS, *check], OWN) == 0
    settings = json.loads((here / "out/results.json").read_text())["settings"]
    assert settings["config"]["model"]["weight"] == 0.5


def test_coordinate_check_of_a_policy_that_leaves_no_choice_of_its_algorithm(here: Path) -> None:
    config = yaml.safe_load(Path(CONFIG).read_text())
    del config["model"]["algorithm"]
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    check = ["--optimizers=adamw", "--widths=16,32,64,128", "--seeds=0", "--steps=2", "--output=out", "--tolerance=9"]
    assert main(["coord-check", "--config=config.yaml", *check], Project(Regresses)) == 0


def test_its_options_are_not_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *ARGUMENTS]) == 2
    assert "arguments: --model.weight" in capsys.readouterr().err
    assert main(["fit", *ARGUMENTS, "--model.wieght=2"], OWN) == 2
    err = capsys.readouterr().err
    assert err.startswith("toy: error: ")
    assert err.endswith("see: toy fit --help\n")


def test_help_says_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], OWN) == 0
    assert "usage: toy VERB" in capsys.readouterr().out
    for verb in ("fit", "compare", "sweep", "coord-check", "bench", "demos", "new"):
        with pytest.raises(SystemExit):
            main([verb, "--help"], OWN)
        said = " ".join(capsys.readouterr().out.split())
        assert f"xample: toy {verb} " in said
        assert not re.search(r"\bdopr (fit|compare|sweep|new)\b", said)
    for arguments in (["test", "--ckpt"], ["new", "my-robot", "pusht"]):
        assert main(arguments, OWN) == 2
        assert f"see: toy {arguments[0]} --help" in capsys.readouterr().err


def test_the_librarys_own_classes_are_not_named() -> None:
    assert LIBRARY.classes == {}
    assert "classes" not in resolve([f"--config={CONFIG}"])
