"""A checkpoint says what it is of, and is judged from itself alone, on that and on nothing else."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from toy_task import CONFIG, DOPR, ToyTask, train
from toy_views import SIDE, VIEWS

from dopr_lightning import checkpoint
from dopr_lightning.cli import main
from dopr_lightning.data import Convention, Demonstrations, EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.evaluation import instantiate

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

QUIET = "--trainer.enable_progress_bar=false"


class Walked(ToyTask):
    """The toy task with a simulator whose version matters, and numbers that mean something."""

    simulated, sha256, keys, missing = "pymunk", "abc", ("x", "t"), False
    max_steps, numbers = 8, range(6)

    @property
    def environment(self) -> EnvironmentSpec:
        return replace(super().environment, simulators=(self.simulated,), max_steps=self.max_steps)

    def load(self) -> Demonstrations:
        if self.missing:
            raise UserError("they are on the other machine")
        return replace(super().load(), sha256=self.sha256, numbers=self.numbers)

    def convention(self) -> Convention:
        return Convention(self.keys, "relative", low=(-1.0,), high=(1.0,))


WALKED = "--data.source=test_checkpoint.Walked"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder, *DOPR, WALKED, "--trainer.max_steps=4")
    return folder / "last.ckpt"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOPR_TRACEBACK", raising=False)


def lines() -> list[dict[str, Any]]:
    """What the runs here noted of each episode."""
    files = sorted(Path.cwd().rglob("rollouts.jsonl"), key=lambda file: file.stat().st_mtime)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def commands(path: Path) -> dict[str, list[str]]:
    """All ways to go on from a checkpoint."""
    from_config = ["--config", CONFIG, WALKED, QUIET, "--ckpt_path", str(path)]
    return {
        "test --ckpt": ["test", "--ckpt", str(path), QUIET],
        "validate --ckpt": ["validate", "--ckpt", str(path), QUIET],
        "test --config": ["test", *from_config],
        "fit": ["fit", *from_config, *DOPR, "--trainer.max_steps=8", "--rollout.report_episodes=1"],
    }


WAYS = list(commands(Path()))


def test_the_record_is_complete_and_plain(trained: Path) -> None:
    held = torch.load(trained, weights_only=True)
    record = held["dopr"]
    assert json.loads(json.dumps(record))  # numbers, words, lists
    assert record["format"] == 1
    assert record["config"]["model"]["network"]["init_args"]["width"] == 16
    assert record["config"]["trainer"]["max_steps"] == 4
    assert record["policy"] == {
        "class": "dopr_lightning.policies.module.PolicyModule",
        "observe": 2,
        "horizon": 4,
        "act": 2,
        "observation_normalizer": "minmax",
        "action_normalizer": "minmax",
    }
    assert record["data"]["class"] == "dopr_lightning.data.module.DemonstrationData"
    assert (record["data"]["source"], record["data"]["sha256"]) == ("toy", "abc")
    assert (record["data"]["train_episodes"], record["data"]["validation_episodes"]) == (5, 1)
    assert record["observation"] == {"keys": ["x", "t"], "dim": 2, "cameras": {}}
    assert record["action"] == {"dim": 1, "kind": "relative", "rotation": None, "low": [-1.0], "high": [1.0]}
    assert (record["environment"]["id"], record["environment"]["max_steps"]) == ("DoprToy-v0", 8)
    for name in ("dopr-lightning", "torch", "lightning", "gymnasium", "pymunk"):
        assert record["versions"][name] == metadata.version(name)
    assert record["ema"] == {"decay": 0.9, "warmup_power": 0.75}
    assert "DoPr" in held["callbacks"]
    assert checkpoint.environment_of(record) == Walked().environment


def test_the_record_names_cameras_and_sizes(tmp_path: Path) -> None:
    train(tmp_path, *VIEWS, "--trainer.max_steps=4")
    record = torch.load(tmp_path / "last.ckpt", weights_only=True)["dopr"]
    assert record["observation"]["cameras"] == {"front": [SIDE, SIDE]}
    assert record["environment"]["cameras"] == ("front",)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_checkpoint_alone_is_judged_as_with_its_configuration(
    verb: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--config", CONFIG, WALKED, QUIET, "--ckpt_path", str(trained)]) == 0
    expected, table = lines(), capsys.readouterr().out
    assert main([verb, "--ckpt", str(trained), QUIET]) == 0
    out = capsys.readouterr().out
    assert lines()[len(expected) :] == expected
    assert len(expected) == {"validate": 2, "test": 3}[verb]

    (loss,) = (line for line in table.splitlines() if "/loss" in line)
    assert loss in out
    assert "ms per prediction of 2 actions, " in out


def test_it_is_judged_at_the_precision_it_was_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def losses() -> list[str]:
        return re.findall(r"test/loss +\S +(\S+)", capsys.readouterr().out)

    precision = "--trainer.precision=bf16-mixed"
    train(tmp_path, WALKED, precision, "--trainer.max_steps=4", "--rollout.episodes=0")
    command = ["test", f"--ckpt={tmp_path / 'last.ckpt'}", QUIET, "--rollout.report_episodes=0"]
    assert (
        main(["test", "--config", CONFIG, WALKED, precision, *command[2:], f"--ckpt_path={tmp_path / 'last.ckpt'}"])
        == 0
    )
    (expected,) = losses()
    assert main(command) == 0
    assert losses() == [expected]
    assert main([*command, "--trainer.precision=32-true"]) == 0
    assert losses() != [expected]


def test_options_go_on_top(trained: Path) -> None:
    Path("more.yaml").write_text("rollout:\n  first_seed: 7\n")
    assert main(["test", f"--ckpt={trained}", QUIET, "--rollout.report_episodes=4", "--config", "more.yaml"]) == 0
    assert [line["seed"] for line in lines()] == [7, 8, 9, 10]


def test_one_callback_needs_no_list(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Lightning's Trainer has it."""
    timer = "--trainer.callbacks=lightning.pytorch.callbacks.Timer"
    assert main(["test", f"--ckpt={trained}", timer, "--rollout.report_episodes=0"]) == 0
    assert main(["fit", "--config", CONFIG, "--trainer.callbacks=dopr_lightning.DoPr", "--trainer.max_steps=4"]) == 0
    assert "optimizer: DoPr-adamw" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--model.seed=3", "--rollout.episods=3", "--trainer.max_step=3"])
def test_other_options_are_refused(option: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--ckpt", str(trained), option]) == 2
    err = capsys.readouterr().err
    assert option.split("=")[0] in err
    assert "with --ckpt can be given: --trainer.*, --rollout.*, --data.*" in err


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("dopr: error: ")
    assert err.count("\n") == 1
    assert lines() == []
    return err


CHANGES = {
    "sha256": ("def", "toy with sha256 abc, and this is toy with def; give the demonstrations"),
    "keys": (("t", "x"), "observes ['x', 't'], and here it would be ['t', 'x']"),
    "numbers": (
        range(1, 7),
        "on other episodes of toy than those here, and may have seen what is held out; give --data.",
    ),
    "max_steps": (9, "another environment (max_steps: 8 -> 9)"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", CHANGES)
def test_what_it_was_not_trained_for_is_refused(
    what: str, way: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value, said = CHANGES[what]
    monkeypatch.setattr(Walked, what, value)
    assert said in refusal(commands(trained)[way], capsys)


@pytest.mark.parametrize("way", WAYS)
def test_another_split_is_refused(way: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held out would be what it was trained on."""
    line = refusal([*commands(trained)[way], "--data.validation_episodes=3"], capsys)
    assert "on another split (train_episodes: 5 -> 3, train_steps: 60 -> 36, validation_episodes: 1 -> 3, 1 " in line
    assert "--data.validation_episodes as they were" in line


def test_data_of_a_project_may_say_nothing_of_its_split(trained: Path, tmp_path: Path) -> None:
    held = torch.load(trained, weights_only=True)
    held["dopr"]["data"] = {name: held["dopr"]["data"][name] for name in ("class", "source", "sha256")}
    torch.save(held, tmp_path / "other.ckpt")
    assert main(commands(tmp_path / "other.ckpt")["test --ckpt"]) == 0


@pytest.mark.parametrize("way", WAYS)
def test_another_version_of_the_simulator_must_be_accepted(
    way: str,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = metadata.version("pymunk")
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == "pymunk" else "1.0")
    command = commands(trained)[way]
    line = refusal(command, capsys)
    assert f"trained with pymunk {here}, and here is 99.0" in line
    assert f"pip install pymunk=={here}, or go on with --accept_versions true" in line
    with caplog.at_level(logging.WARNING):
        assert main([*command, "--accept_versions", "true"]) == 0
    assert f"trained with pymunk {here}, and here is 99.0: its episodes may differ" in caplog.text
    assert lines()


def test_a_simulator_that_is_not_installed(trained: Path, tmp_path: Path) -> None:
    held = torch.load(trained, weights_only=True)
    held["dopr"]["environment"]["simulators"] = ("pymunk", "gym-nowhere")
    held["dopr"]["versions"]["gym-nowhere"] = "1.2"
    with pytest.raises(UserError, match=r"gym-nowhere is not installed.*pip install gym-nowhere==1.2"):
        checkpoint.check_versions(held["dopr"], accept=True)


def test_without_the_demonstrations_there_are_still_rollouts(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = commands(trained)["test --ckpt"]
    assert main(command) == 0
    expected = lines()
    capsys.readouterr()
    monkeypatch.setattr(Walked, "missing", True)
    with caplog.at_level(logging.WARNING):
        assert main(command) == 0
    assert lines()[len(expected) :] == expected
    assert "held-out loss is left out, for want of the demonstrations: they are on the other machine" in caplog.text
    out = capsys.readouterr().out
    assert "rollout/return" in out
    assert "test/loss" not in out


def test_a_checkpoint_without_a_record(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = torch.load(trained, weights_only=True)
    del held["dopr"]
    old = tmp_path / "old.ckpt"
    torch.save(held, old)
    line = refusal(commands(old)["test --ckpt"], capsys)
    assert "does not say which configuration, data and environment" in line
    assert f"what still works: --config FILES --ckpt_path {old}" in line
    assert main(commands(old)["test --config"]) == 0


@pytest.mark.parametrize("foreign", ["theirs", ["theirs"], {"format": 1}])
def test_something_of_anothers_under_its_key_is_no_record(foreign: Any, tmp_path: Path) -> None:
    held = {"dopr": foreign, "state_dict": {}}
    torch.save(held, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="does not say which configuration, data and environment"):
        checkpoint.read(tmp_path / "foreign.ckpt")
    checkpoint.SelfDescription({}).on_load_checkpoint(Trainer(logger=False), LightningModule(), held)


def test_named_tuples_are_tuples_in_a_record(tmp_path: Path) -> None:
    class Camera(NamedTuple):
        name: str
        size: tuple[int, int]

    torch.save(checkpoint._plain([Camera("wrist", (84, 84))], "a test"), tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True) == [("wrist", (84, 84))]


def test_weights_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "--config", CONFIG, QUIET, "--checkpoint.save_weights_only=true"]
    assert "save_weights_only=true would save" in refusal(command, capsys)


def test_an_environment_that_no_checkpoint_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(ToyTask().environment, kwargs={"fault": None, "noise": torch.zeros(1)})
    monkeypatch.setattr(Walked, "environment", spec)
    with pytest.raises(UserError, match=r"'DoprToy-v0' holds tensor.*use plain values"):
        train(tmp_path, WALKED, "--trainer.max_steps=4", "--rollout.episodes=0", "--rollout.report_episodes=0")


def test_numbers_of_numpy_in_the_record_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"low": tuple(np.float32([-1])), "high": np.float32([1])}
    monkeypatch.setattr(Walked, "convention", lambda self: Convention(**bounds))
    train(tmp_path, WALKED, "--trainer.max_steps=4", "--rollout.episodes=0")
    assert checkpoint.read(tmp_path / "last.ckpt")["dopr"]["action"]["low"] == [-1.0]


def test_data_that_no_checkpoint_can_hold_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Walked.load
    monkeypatch.setattr(Walked, "load", lambda self: replace(load(self), source=tmp_path))
    with pytest.raises(UserError, match=r"what the data says of itself holds .*Path.*use plain values"):
        train(tmp_path, WALKED, "--trainer.max_steps=4", "--rollout.episodes=0")
    assert not list(tmp_path.glob("*.ckpt"))


def test_the_data_module_is_that_of_the_record(trained: Path) -> None:
    record = torch.load(trained, weights_only=True)["dopr"]
    data = instantiate(checkpoint.class_of(record, "data"), record["config"]["data"])
    assert isinstance(data.source, Walked)
    assert (data.observe, data.horizon, data.act, data.batch_size) == (2, 4, 2, 12)
