"""One run of a comparison: killed anywhere, it ends as if nothing had happened; and it is never another run's."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_environment import Toy
from toy_project import Manual, PassesOver
from toy_task import CONFIG, DOPR, FIRST_SEED, STEPS

from dopr_lightning.cli import main
from dopr_lightning.errors import UserError
from dopr_lightning.experiments.run_trial import run_trial
from dopr_lightning.experiments.trial import DivergedError, Failure, Record, Trial, load_outcome
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.project import Project
from dopr_lightning.rollout.callback import SELECTION_OFFSET, RolloutEvaluation
from dopr_lightning.training import resolve

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

SEEDS = [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
LAST = 5 * STEPS


def trial(folder: Path, *overrides: str, seed: int = 0) -> Trial:
    arguments = (f"--config={CONFIG}", *DOPR, *overrides)
    return Trial("dopr-adamw seed 0", folder, arguments, resolve(arguments), seed, FIRST_SEED, len(SEEDS))


def run(one: Trial) -> tuple[Record, list[int]]:
    """Its record, and the steps it reports."""
    steps: list[int] = []
    return run_trial(one, lambda name, step, total: steps.append(step)), steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The uninterrupted run."""
    return run(trial(tmp_path_factory.mktemp("whole")))[0]


def assert_same(one: Record, other: Record) -> None:
    assert (one.val_loss, one.episodes, one.settings) == (other.val_loss, other.episodes, other.settings)


def test_the_record(tmp_path: Path, whole: Record, capsys: pytest.CaptureFixture[str]) -> None:
    one = trial(tmp_path)
    assert load_outcome(one) is None
    Toy.resets.clear()
    capsys.readouterr()
    record, steps = run(one)
    assert capsys.readouterr().out == ""
    assert_same(record, whole)
    assert steps == list(range(1, LAST + 1))
    assert [seed for seed in Toy.resets if seed < SELECTION_OFFSET] == SEEDS
    assert record.mean == sum(record.episodes) / len(SEEDS)
    assert record.train_seconds > 0
    assert load_outcome(one) == record
    assert any(path.name.startswith("events.out.tfevents") for path in tmp_path.iterdir())
    reported = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["value"] for line in reported if line["stage"] == "test"] == record.episodes


def test_options_that_a_later_version_has_and_nobody_set_change_nothing(tmp_path: Path, whole: Record) -> None:
    one = trial(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps(asdict(whole)))
    optimizer = one.config["model"]["optimizer"]
    later = one.config | {"model": one.config["model"] | {"optimizer": optimizer | {"new": {}}}}
    assert load_outcome(replace(one, config=later)) == whole
    later["model"]["optimizer"]["new"] = {"set": 1}
    with pytest.raises(UserError, match=r"other settings \(model\.optimizer\.new\.set: unset -> 1\)"):
        load_outcome(replace(one, config=later))


def test_the_averaged_weights_are_judged(tmp_path: Path, whole: Record) -> None:
    """With an average that forgets at once, the trained weights themselves: another loss."""
    record, _ = run(trial(tmp_path, "--ema.decay=0"))
    assert record.val_loss != whole.val_loss
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in checkpoint["current_model_state"].items():
        assert torch.equal(value, checkpoint["state_dict"][name])


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.parametrize("policy", [PassesOver, Manual])
def test_a_batch_need_not_have_a_loss(policy: type[PolicyModule], tmp_path: Path) -> None:
    record, steps = run(replace(trial(tmp_path), project=Project(policy=policy)))
    assert math.isfinite(record.val_loss)
    assert record.steps == steps[-1] == LAST


class KilledError(Exception):
    pass


def test_killed_in_training_it_goes_on_from_its_checkpoint(tmp_path: Path, whole: Record) -> None:
    one = trial(tmp_path)

    def kill(name: str, step: int, total: int) -> None:
        if step == 2 * STEPS + 3:
            raise KilledError

    with pytest.raises(KilledError):
        run_trial(one, kill)
    assert load_outcome(one) is None
    record, steps = run(one)
    assert steps == list(range(2 * STEPS + 1, LAST + 1))
    assert_same(record, whole)
    assert record.train_seconds > 0


def test_killed_in_its_rollouts_it_trains_no_more(
    tmp_path: Path, whole: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And judges the averaged weights, although there was no training after which they are put in place."""

    def kill(*_: Any) -> None:
        raise KilledError

    one = trial(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RolloutEvaluation, "on_test_epoch_start", kill)
        with pytest.raises(KilledError):
            run(one)
    record, steps = run(one)
    assert steps == []
    assert_same(record, whole)
    assert record.train_seconds > 0


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path, whole: Record) -> None:
    """Finished or not."""
    finished, killed = trial(tmp_path / "finished"), trial(tmp_path / "killed")
    run(finished)

    def kill(name: str, step: int, total: int) -> None:
        if step == STEPS + 1:
            raise KilledError

    with pytest.raises(KilledError):
        run_trial(killed, kill)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for one in (finished, killed):
        wider = trial(one.folder, "--model.network.width=24")
        with pytest.raises(UserError, match=r"model\.network\.init_args\.width: 16 -> 24\); choose another --output"):
            load_outcome(wider)
        with pytest.raises(UserError, match=r"seed: 0 -> 1"):
            load_outcome(replace(one, seed=1))
        with pytest.raises(UserError, match=r"episodes: 3 -> 4"):
            load_outcome(replace(one, episodes=4))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_failed_before_its_first_checkpoint_may_be_mended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lr must be positive"):
        run(trial(tmp_path, "--model.optimizer.lr=0"))
    mended = trial(tmp_path)
    assert load_outcome(mended) is None
    assert run(mended)[1][-1] == LAST


def test_without_rollouts_the_loss_is_the_same(tmp_path: Path, whole: Record) -> None:
    one = replace(trial(tmp_path, "--rollout.episodes=0"), episodes=0)
    Toy.resets.clear()
    record, _ = run(one)
    assert Toy.resets == []
    assert record.episodes == []
    assert math.isnan(record.mean)
    assert record.val_loss == whole.val_loss
    assert load_outcome(one) == record


def test_checkpoints_may_go_when_there_is_a_record(tmp_path: Path) -> None:
    run(replace(trial(tmp_path, "--trainer.max_steps=4"), keep_checkpoints=False))
    assert (tmp_path / "record.json").exists()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_divergence_is_kept_like_a_record(tmp_path: Path) -> None:
    """At once, not after the rest of the training; and it is of these settings alone."""
    one = trial(tmp_path, "--model.optimizer.base=sgd", "--model.optimizer.lr=1e30")
    steps: list[int] = []
    with pytest.raises(DivergedError) as raised:
        run_trial(one, lambda name, step, total: steps.append(step))
    assert steps[-1] < STEPS
    said = f"diverged: the training loss is not finite, by step {steps[-1]} of {LAST}"
    outcome = load_outcome(one)
    assert isinstance(outcome, Failure)
    assert str(raised.value) == outcome.message == said
    assert outcome.diverged
    mended = trial(tmp_path, "--model.optimizer.base=sgd")
    assert load_outcome(mended) is None
    assert run(mended)[1][-1] == LAST
    assert isinstance(load_outcome(mended), Record)


def test_an_error_that_divergence_causes_is_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step's weights are infinite, which no loss has shown; a rollout is the first to stumble over them."""

    def stumble(callback: Any, trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module.network.readout.bias.fill_(math.inf)
        raise UserError("the policy's action is not finite")

    monkeypatch.setattr(RolloutEvaluation, "on_test_epoch_start", stumble)
    with pytest.raises(DivergedError, match=r"^diverged: the policy's action is not finite"):
        run(trial(tmp_path, "--trainer.max_steps=4"))

    def other(*_: Any) -> None:
        raise UserError("the simulator fell over")

    monkeypatch.setattr(RolloutEvaluation, "on_test_epoch_start", other)
    one = trial(tmp_path / "other", "--trainer.max_steps=4")
    with pytest.raises(UserError, match=r"^the simulator") as raised:
        run(one)
    assert not isinstance(raised.value, DivergedError)
    assert load_outcome(one) is None


WIDTHS = "--widths=16,32,64"


@pytest.mark.parametrize("content", ['{"passed": true, "settings": {}}', "[]", "{"])
@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("compare", ["--config", CONFIG, "--optimizers=adamw", "--seeds=0"]),
        ("sweep", ["--config", CONFIG, "--optimizer=adamw", "--seeds=0", WIDTHS]),
        ("coord-check", ["--config", CONFIG, "--optimizers=adamw", WIDTHS]),
        ("bench", ["--quick"]),
    ],
)
def test_no_command_replaces_results_of_something_else(
    verb: str, options: list[str], content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    results.write_text(content)
    assert main([verb, *options, "--output", str(tmp_path)]) == 2
    assert f"{results} holds other results, not of this command; choose another --output" in capsys.readouterr().err
    assert results.read_text() == content
