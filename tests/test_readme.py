"""Every command and snippet in the README, and in the guide to muP, runs."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from shared_data import shared_data

from dopr_lightning.cli import main

ROOT = Path(__file__).parents[1]
TEXT = "".join((ROOT / name).read_text() for name in ("README.md", "docs/mup.md"))
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
LINES = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]
COMMANDS = list(dict.fromkeys(LINES))  # the guide repeats some of the README's
DOPR = [command for command in COMMANDS if command.startswith("dopr ")]

# The commands as they stand, with a budget for tests.
SMALL = {
    "compare": ["--optimizers=adamw,dopr-muon", "--seeds=0", "--episodes=2", "--workers=1", "--trainer.max_steps=60"],
    "fit": ["--trainer.max_steps=110", "--trainer.limit_train_batches=40", "--rollout.episodes=2"],
    "coord-check": ["--optimizers=dopr-adamw", "--seeds=0"],
    "sweep": ["--widths=16,32", "--lr-octaves=0.5", "--seeds=0", "--parametrizations=mup", "--trainer.max_steps=110"],
    "bench": ["--models=mlp-256", "--threads=1"],
    "demos": [],
    "test": ["--rollout.report_episodes=2"],
}


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOPR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(shared_data("minari")))
    shutil.copy(shared_data("pusht/pusht_cchi_v7_replay.zarr.zip"), tmp_path)
    assert DOPR
    for command in DOPR:
        _, verb, *arguments = shlex.split(command, comments=True)
        if "humanoid.yaml" in arguments:  # the users' dataset id is another one's twin in the development data
            arguments.append("--data.source.init_args.dataset_id=mujoco/humanoid/expert-demos-v0")
        assert main([verb, *arguments, *SMALL[verb]]) == 0, command


def test_the_other_commands_are_those_of_the_continuous_integration() -> None:
    others = [shlex.split(command, comments=True) for command in COMMANDS if command not in DOPR]
    assert others == [["make", "quickstart"], ["make", "test"]]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^test: quickstart", (ROOT / "Makefile").read_text(), re.MULTILINE)
