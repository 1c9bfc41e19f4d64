"""Every command of the README and of docs/ runs with a small budget; those that took hours are parsed as they stand."""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from dopr_lightning.configs import available
from pages import PAGES, RECORDED, ROOT, Block, assignments, blocks, code_spans, files, of_language, write_files
from shared_data import shared_data

from dopr_lightning.cli import VERBS, main
from dopr_lightning.configuration import find_config
from dopr_lightning.errors import Parser
from dopr_lightning.experiments import runner
from dopr_lightning.experiments.arms import parse_arms
from dopr_lightning.experiments.display import Display
from dopr_lightning.experiments.trial import Outcome, Trial
from dopr_lightning.training import quiet, resolve

# What a user downloads, and where the tests have it.
DOWNLOADS = {"pusht_cchi_v7_replay.zarr.zip": "pusht/pusht_cchi_v7_replay.zarr.zip"}

SHORT = [
    "--trainer.max_steps=4",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.enable_progress_bar=false",
    "--model.optimizer.warmup_steps=0",
    "--rollout.episodes=1",
]
ONE_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
TRAIN = [*SHORT, "--rollout.report_episodes=1"]
SMALL = {
    "fit": [*TRAIN, *ONE_CPU, "--trainer.precision=32-true"],
    "validate": ["--trainer.limit_val_batches=1", "--rollout.episodes=1", *ONE_CPU],
    "test": ["--trainer.limit_test_batches=1", "--rollout.report_episodes=1", *ONE_CPU],
    "compare": [*SHORT, "--optimizers=adamw,dopr-muon", "--seeds=0", "--episodes=1", "--workers=1"],
    "coord-check": ["--optimizers=dopr-adamw", "--seeds=0"],
    "sweep": [*TRAIN[:-1], "--widths=16,32", "--seeds=0", "--parametrizations=mup", "--workers=1"],
    "bench": ["--threads=1"],
    "demos": [],
    "new": [],
}
"""What makes a verb's command small; it comes last, and so wins."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> Path:
    """An empty folder to run commands in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOPR_HOME", str(tmp_path / "home"))
    quiet()
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page: str) -> None:
    recorded = {"indented"} if page in RECORDED else set()
    known = {"python", "bash", "yaml", "text", "{toctree}", "{eval-rst}", "{include}"} | recorded
    for block in blocks(page):
        assert block.language in known, f"{block.id} is {block.language or 'of no language'}"


@pytest.mark.parametrize("block", of_language("bash"), ids=lambda block: block.id)
def test_commands_run(block: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(block.page, here)
    for name, data in DOWNLOADS.items():
        if name in block.text:
            shutil.copy(shared_data(data), here)
    if "humanoid.yaml" in block.text:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(shared_data("minari")))
    for command in block.commands:
        run(command, block.page, monkeypatch)


def run(command: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as a shell would, or say that nobody knows how."""
    environment, (program, *arguments) = assignments(command)
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        if "PYTHONPATH" in environment:
            patch.syspath_prepend(str(Path(environment["PYTHONPATH"]).absolute()))
        assert program in PROGRAMS, f"{page}: no test knows how to run {command!r}"
        PROGRAMS[program](arguments, page, patch)


def run_dopr(arguments: Sequence[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verb, *options = arguments
    if shlex.join(["dopr", *arguments]) == quick_start():
        return  # `make quickstart` runs it in full
    small = list(SMALL[verb])
    monkeypatch.setattr(runner, "_in_processes", in_this_process)
    if verb == "fit" and "--mup.from_sweep" not in options:
        resolve(options)  # as it stands; on this machine it might not run
    if verb == "bench" and "--model" not in options:
        small.append("--models=mlp-256")
    if verb == "sweep" and "--lr-octaves" in options:
        small.append("--lr-octaves=0.5")
    if "humanoid.yaml" in options:  # the users' dataset id is another one's twin in the development data
        small.append("--data.source.init_args.dataset_id=mujoco/humanoid/expert-demos-v0")
    assert main([verb, *options, *small]) == 0, shlex.join(arguments)


def quick_start() -> str:
    """The command that `make quickstart` runs, and `make test` with it."""
    recipe = re.search(r"^quickstart: .*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    return recipe[1]


def in_this_process(trials: Sequence[Trial], display: Display) -> dict[str, Outcome]:
    """As the runner's worker processes do, which take most of their time to start."""
    return {trial.name: runner.attempt(trial, lambda *progress: None) for trial in trials}


def run_python(arguments: Sequence[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments[0] in files(page)
    monkeypatch.setattr(sys, "argv", list(arguments))
    runpy.run_path(arguments[0], run_name="__main__")


def check_make(arguments: Sequence[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What continuous integration makes: `make test` makes the quick start first, the site is a test of its own."""
    makefile = (ROOT / "Makefile").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^test: quickstart", makefile, re.MULTILINE)
    assert arguments[0] in ("quickstart", "test", "docs")
    assert len(arguments) == 1
    assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)


def check_pip(arguments: Sequence[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Makefile installs, or a part of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    verb, *options = arguments
    assert verb == "install"
    while options:
        match options.pop(0):
            case "-c":
                assert options.pop(0) == "constraints.txt"
            case "-e":
                target = re.fullmatch(r"\.(?:\[([\w,]+)\])?", options.pop(0))
                assert target
                for extra in (target[1] or "").split(",") if target[1] else ():
                    assert extra in project["optional-dependencies"]
            case other:
                raise AssertionError(f"{page}: pip install {other}")


def check_tensorboard(arguments: Sequence[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_spec("tensorboard")
    assert arguments[0] == "--logdir"
    assert len(arguments) == 2


def run_srun(arguments: Sequence[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one process of a job without a scheduler; what asks for one is taken out."""
    run_dopr([*arguments[1:], "--trainer.plugins=null"], page, monkeypatch)


def check_sbatch(arguments: Sequence[str], page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is a block of the page, which runs as any other."""
    assert list(arguments) == [name for name in files(page) if name.endswith(".sh")]


PROGRAMS: dict[str, Callable[[Sequence[str], str, pytest.MonkeyPatch], None]] = {
    "dopr": run_dopr,
    "python": run_python,
    "srun": run_srun,
    "sbatch": check_sbatch,
    "make": check_make,
    "pip": check_pip,
    "tensorboard": check_tensorboard,
}


class Parsed(Exception):  # noqa: N818 - no error
    """Raised where a command has been parsed; not a user's mistake, so `main` lets it through."""


def parse(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what ``dopr`` does with a command until it begins to work."""
    verb, *options = arguments
    if verb in ("fit", "validate", "test"):
        resolve(options)
        return

    def stop(parser: Any, *args: Any) -> None:
        raise Parsed(*original(parser, *args))

    original = Parser.parse_known_args
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", stop)
        with pytest.raises(Parsed) as caught:
            main([verb, *options])
    parsed, overrides = caught.value.args
    if not hasattr(parsed, "config"):
        assert not overrides
        return
    named = getattr(parsed, "optimizers", None) or getattr(parsed, "optimizer", None) or "adamw"
    for arm in parse_arms(named):
        resolve([*(f"--config={find_config(name)}" for name in parsed.config), *overrides, *arm.arguments(None, 0.01)])


@pytest.mark.parametrize("page", RECORDED)
def test_recorded_commands_are_still_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        if block.language != "indented":
            continue
        for command in block.commands:
            environment, words = assignments(command)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)  # some are used in later commands
            match words:
                case []:
                    pass
                case ["dopr", *arguments]:
                    parse(arguments, monkeypatch)
                case ["python", script, *arguments]:
                    text = (ROOT / script).read_text()
                    assert all(f'"{flag}"' in text for flag in arguments if flag.startswith("--")), command
                case _:
                    raise AssertionError(f"{block.id}: no test knows {command!r}")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_configurations_in_the_text_exist(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {"config.yaml", "recommended.yaml"}  # by runs
    for span in code_spans(page):
        if re.fullmatch(r"[\w/-]+\.yaml", span):
            assert span in {*available(), *files(page), *written}, f"{page}: there is no {span}"
        match span.split():
            case ["dopr", verb, *options] if not verb.startswith("-") and verb != "...":
                assert verb in VERBS, f"{page}: there is no {span!r}"
                flags = [word for word in options if word.startswith("--")]
                if flags:
                    with contextlib.suppress(SystemExit):
                        main([verb, "--help"])
                    explained = capsys.readouterr().out
                    assert all(flag in explained for flag in flags), f"{page}: {span!r}"
