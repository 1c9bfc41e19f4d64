"""``dopr compare`` from end to end, and which learning rate it picks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_task import CONFIG, FIRST_SEED, STEPS, ToyTask

from dopr_lightning.cli import main
from dopr_lightning.experiments import compare, display, runner
from dopr_lightning.experiments.compare import TUNING_SEED
from dopr_lightning.experiments.runner import KILLED
from dopr_lightning.experiments.trial import Failure, Outcome, Record, Trial
from dopr_lightning.rollout.callback import SELECTION_OFFSET
from dopr_lightning.rollout.statistics import crossed_interval

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

ARMS = ["adamw", "dopr-muon"]


def arguments(output: Path, *more: str) -> list[str]:
    return ["compare", "--config", CONFIG, "--output", str(output), "--workers", "1", "--episodes", "3", *more]


def check_schema(results: dict[str, Any], seeds: list[int]) -> None:
    """The issue's keys, and beside them only those listed here."""
    assert set(results) == {"task", "metric", "budget", "versions", "data", "arms", "differences"}
    assert (results["task"], results["metric"]) == ("DoprToy-v0", "return")
    assert results["budget"] == {
        "steps": 20,
        "batch_size": 12,
        "train_episodes": 5,
        "parameters": results["budget"]["parameters"],
        "episodes_per_seed": 3,
        "tuning_runs_per_arm": 0,
        "episodes_per_tuning_run": 0,
    }
    assert {"dopr-lightning", "torch", "lightning", "gymnasium"} <= set(results["versions"])
    assert results["data"]["sha256"] == "abc"
    assert [arm["name"] for arm in results["arms"]] == ARMS
    for arm in results["arms"]:
        required = {"name", "seeds", "val_loss", "episodes", "mean", "ci95", "train_seconds"}
        assert set(arm) == required | {"diverged", "lr", "damping", "tuning"}
        assert arm["seeds"] == seeds
        for name in ("val_loss", "train_seconds"):
            assert len(arm[name]) == len(seeds)
            assert all(isinstance(value, float) and value > 0 for value in arm[name])
        assert [len(episodes) for episodes in arm["episodes"]] == [3] * len(seeds)
        assert len({tuple(episodes) for episodes in arm["episodes"]}) == len(seeds)  # runs of their own
        assert arm["mean"] == pytest.approx(np.mean(arm["episodes"]))
        assert arm["ci95"] == list(crossed_interval(arm["episodes"]))
        assert arm["ci95"][0] <= arm["mean"] <= arm["ci95"][1]
    (difference,) = results["differences"]
    assert (difference["name"], difference["against"]) == ("dopr-muon", "adamw")
    means = [np.mean(arm["episodes"], axis=1) for arm in results["arms"]]
    assert difference["per_seed"] == pytest.approx(means[1] - means[0])
    ours, theirs = (np.array(arm["episodes"]) for arm in results["arms"])
    assert difference["ci95"] == list(crossed_interval((theirs - ours).tolist()))
    assert results["arms"][0]["damping"] is None
    assert results["arms"][1]["damping"] == 0.01


def stamps(output: Path) -> dict[str, int]:
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("record.json")}


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = arguments(output, "--optimizers", ",".join(ARMS))
    assert main([*command, "--seeds", "0,1"]) == 0
    said = capsys.readouterr().out
    assert str(output / "compare.png") in said.replace("\n", "")
    for name in ARMS:
        assert f"{name} seed 1: val loss" in said  # progress, where there is no terminal
        assert f"│ {name} " in said  # the table
    results = json.loads((output / "results.json").read_text())
    check_schema(results, [0, 1])
    with Image.open(output / "compare.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
    first = stamps(output)
    assert sorted(first) == [f"runs/{arm}/seed-{seed}/record.json" for arm in ARMS for seed in (0, 1)]
    for name in first:
        record = json.loads((output / name).read_text())
        assert record["settings"]["first_seed"] == FIRST_SEED
        assert list((output / name).parent.glob("events.out.tfevents.*"))
        log = (output / name).with_name("log.txt").read_text()
        assert log.count("`max_steps=20` reached") == 1  # of this run, though one process ran them all
        assert "Error" not in log

    # The same again: nothing is trained, and the files are made anew.
    (output / "results.json").unlink()
    (output / "compare.png").unlink()
    assert main([*command, "--seeds", "0,1"]) == 0
    assert stamps(output) == first
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "compare.png").exists()

    # Fewer arms or seeds would replace the results by less.
    capsys.readouterr()
    assert main([*arguments(output, "--optimizers", "adamw"), "--seeds", "1,2"]) == 2
    assert "results.json also has dopr-muon, seed 0; name them again too" in capsys.readouterr().err
    assert json.loads((output / "results.json").read_text()) == results

    # One more seed: one more run of each arm.
    assert main([*command, "--seeds", "0,1,2"]) == 0
    assert "[6/6] " in capsys.readouterr().out
    more = stamps(output)
    assert {name: more[name] for name in first} == first
    assert more.keys() - first.keys() == {f"runs/{arm}/seed-2/record.json" for arm in ARMS}
    for before, after in zip(results["arms"], json.loads((output / "results.json").read_text())["arms"], strict=True):
        assert after["val_loss"][:2] == before["val_loss"]
        assert len(after["episodes"]) == 3

    # Another configuration in the same folder, also for an arm that is not there yet: refused, and nothing changes.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for names in ("adamw", "sgd"):
        assert main([*arguments(output, "--optimizers", names), "--seeds=0", "--model.network.width=24"]) == 2
        error = capsys.readouterr().err
        assert "(model.network.init_args.width: 16 -> 24); choose another --output" in error
        assert error.count("\n") == 1
    assert main([*arguments(output, "--optimizers", "dopr-muon"), "--seeds=0", "--damping=0.1"]) == 2
    assert "damping: 0.01 -> 0.1" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_length_in_epochs_is_told_in_the_steps_that_were_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int, int]] = []
    epochs = ("--trainer.max_steps=-1", "--trainer.max_epochs=2", "--optimizers=adamw", "--seeds=0,1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(display.Display, "progress", lambda self, *progress: seen.append(progress))
        assert main(arguments(tmp_path / "out", *epochs)) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["budget"]["steps"] == 2 * STEPS
    assert f"DoprToy-v0: {2 * STEPS} steps, 3 rollouts per seed" in capsys.readouterr().out
    assert ("adamw seed 0", 2 * STEPS, 2 * STEPS) in seen


def test_an_arm_that_diverges_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At this rate SGD leaves the numbers, and AdamW, whose steps do not grow with the gradient, does not."""
    more = ("--optimizers", "sgd,adamw", "--seeds", "0", "--model.optimizer.lr=1e3", "--trainer.num_sanity_val_steps=2")
    assert main(arguments(tmp_path / "out", *more)) == 0
    out = capsys.readouterr().out
    assert "adamw seed 0: val loss" in out
    assert list(stamps(tmp_path / "out")) == ["runs/adamw/seed-0/record.json"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    sgd, adamw = results["arms"]
    assert (sgd["mean"], sgd["episodes"]) == (None, [None])
    assert sgd["diverged"]["0"].startswith("diverged: ")
    assert (len(adamw["episodes"][0]), adamw["diverged"]) == (3, {})
    assert results["differences"][0]["mean"] is None

    # Of the same command nothing else would come.
    (tmp_path / "out" / "results.json").unlink()
    assert main(arguments(tmp_path / "out", *more)) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_runs_that_were_killed_choose_no_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor make a table: the same command, given again, goes on."""
    monkeypatch.setattr(runner, "_in_processes", lambda trials, display: {trial.name: KILLED for trial in trials})
    more = ("--optimizers", "adamw", "--seeds", "0", "--learning-rates=1e-3,3e-3")
    assert main(arguments(tmp_path / "out", *more)) == 2
    said = "adamw seed 1000 lr 0.001 (tuning), adamw seed 1000 lr 0.003 (tuning) failed: a worker process was killed"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_tuning_picks_by_rollouts_on_seeds_that_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of made-up records: the best rollouts have the worst loss, and each arm has its own best rate."""
    best = {"adamw": 3e-3, "dopr-muon": 1e-3}
    trials: list[Trial] = []

    def made_up(wanted: Sequence[Trial], workers: int) -> list[Record]:
        trials.extend(wanted)
        records = []
        for trial in wanted:
            arm, rate = trial.name.split()[0], trial.config["model"]["optimizer"]["lr"]
            good = rate == best[arm]
            records.append(Record(5.0 if good else rate, [10.0 if good else 1.0, 2.0], 1.0, trial.settings))
        return records

    monkeypatch.setattr(compare, "run_all", made_up)
    grid = ("--learning-rates", "1e-3,3e-3,1e-2", "--optimizers", ",".join(ARMS), "--seeds", "0,1")
    assert main(arguments(tmp_path / "out", *grid)) == 0

    tuning, reported = trials[:6], trials[6:]
    assert len(reported) == 4
    assert {(t.seed, t.first_seed) for t in tuning} == {(TUNING_SEED, FIRST_SEED + SELECTION_OFFSET)}
    assert {(t.seed, t.first_seed) for t in reported} == {(0, FIRST_SEED), (1, FIRST_SEED)}
    assert len({t.folder for t in trials}) == 10
    for trial in reported:
        assert trial.config["model"]["optimizer"]["lr"] == best[trial.name.split()[0]]
    for trial in trials:
        assert ("callbacks" in trial.config["trainer"]) == trial.name.startswith("dopr-")

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["budget"]["tuning_runs_per_arm"] == 3
    for arm in results["arms"]:
        assert arm["lr"] == best[arm["name"]]
        assert [entry["lr"] for entry in arm["tuning"]] == [1e-3, 3e-3, 1e-2]
        assert max(arm["tuning"], key=lambda entry: entry["mean"])["lr"] == arm["lr"]
        assert {entry["mean"] for entry in arm["tuning"]} == {6.0, 1.5}
    said = capsys.readouterr().out
    assert "dopr-muon: its best learning rate, 0.001, lies at an end of the grid" in said
    assert "adamw: its best" not in said


def test_tuning_may_take_several_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first seed alone would have chosen the other rate."""
    trials: list[Trial] = []

    def made_up(wanted: Sequence[Trial], workers: int) -> list[Record]:
        trials.extend(wanted)
        lucky = {(1e-3, TUNING_SEED): 9.0, (1e-3, TUNING_SEED + 1): 1.0}
        rates = [trial.config["model"]["optimizer"]["lr"] for trial in wanted]
        return [
            Record(1.0, [lucky.get((rate, t.seed), 6.0)], 1.0, t.settings)
            for t, rate in zip(wanted, rates, strict=True)
        ]

    monkeypatch.setattr(compare, "run_all", made_up)
    grid = ("--learning-rates", "1e-3,3e-3", "--tuning-seeds", "2", "--optimizers", "adamw")
    assert main(arguments(tmp_path / "out", *grid, "--seeds", "0")) == 0
    assert [trial.seed for trial in trials] == [TUNING_SEED, TUNING_SEED + 1] * 2 + [0]
    assert len({trial.folder for trial in trials}) == len({trial.name for trial in trials}) == 5
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["budget"]["tuning_runs_per_arm"] == 4
    assert results["arms"][0]["lr"] == 3e-3
    first, second = results["arms"][0]["tuning"]
    assert (first["mean"], first["per_seed"]) == (5.0, [9.0, 1.0])
    assert (second["mean"], second["per_seed"]) == (6.0, [6.0, 6.0])

    assert {trial.episodes for trial in trials} == {results["budget"]["episodes_per_tuning_run"]} == {3}

    trials.clear()
    assert main(arguments(tmp_path / "more", *grid, "--seeds", "0", "--tuning-episodes", "7")) == 0
    assert [trial.episodes for trial in trials] == [7] * 4 + [3]

    trials.clear()
    assert main(arguments(tmp_path / "first", *grid, "--seeds", "0", "--rollout.first_seed=500")) == 0
    assert [trial.first_seed for trial in trials] == [500 + SELECTION_OFFSET] * 4 + [500]

    assert main(arguments(tmp_path / "other", *grid, "--seeds", f"0,{TUNING_SEED + 1}")) == 2
    assert "--seeds 1001: a run of that seed tunes the learning rate" in capsys.readouterr().err
    assert main(arguments(tmp_path / "other", "--seeds=0", "--tuning-seeds=2")) == 2
    assert "--tuning-seeds, --tuning-episodes: nothing is tuned; give --learning-rates too" in capsys.readouterr().err
    assert main(arguments(tmp_path / "other", *grid, "--tuning-seeds", "0")) == 2
    assert "--tuning-seeds must be at least 1, got 0" in capsys.readouterr().err


def test_runs_on_other_demonstrations_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration names the same file, in which there is something else now."""

    def made_up(wanted: Sequence[Trial], workers: int) -> list[Record]:
        for trial in wanted:
            trial.folder.mkdir(parents=True, exist_ok=True)
            (trial.folder / "record.json").touch()
        return [Record(1.0, [1.0, 2.0], 1.0, trial.settings) for trial in wanted]

    monkeypatch.setattr(compare, "run_all", made_up)
    command = arguments(tmp_path / "out", "--optimizers", "adamw", "--seeds=0")
    assert main(command) == 0
    whole = ToyTask.load
    monkeypatch.setattr(ToyTask, "load", lambda self: replace(whole(self), sha256="def"))
    assert main(command) == 2
    said = "holds runs on demonstrations with sha256 abc, and here they have def: the data changed; choose another"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("order", ["adamw,dopr-adamw", "dopr-adamw,adamw"])
def test_arms_differ_by_their_optimizer_alone(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials: dict[str, Trial] = {}

    def made_up(wanted: Sequence[Trial], workers: int) -> list[Record]:
        trials.update({trial.name.split()[0]: trial for trial in wanted})
        return [Record(1.0, [1.0, 2.0], 1.0, trial.settings) for trial in wanted]

    monkeypatch.setattr(compare, "run_all", made_up)
    assert main(arguments(tmp_path / "out", "--optimizers", order, "--seeds=0", "--damping=0.05")) == 0
    plain, dopr = trials["adamw"].config, trials["dopr-adamw"].config
    (callback,) = dopr["trainer"].pop("callbacks")
    assert callback["class_path"] == "dopr_lightning.DoPr"
    assert callback["init_args"]["damping"] == 0.05
    assert dopr == plain


def test_an_arms_own_damping_is_the_one_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(wanted: Sequence[Trial], workers: int) -> list[Record]:
        return [Record(1.0, [1.0, 2.0], 1.0, trial.settings) for trial in wanted]

    monkeypatch.setattr(compare, "run_all", made_up)
    optimizers = "adamw,dopr-adamw,dopr-adamw+damping=0.3+ema=0.9"
    assert main(arguments(tmp_path / "out", "--optimizers", optimizers, "--seeds=0", "--damping=0.05")) == 0
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert [arm["damping"] for arm in arms] == [None, 0.05, 0.3]


def test_patterns_that_match_nothing_are_named_before_anything_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "run_all", lambda trials, workers: pytest.fail("nothing was to be trained"))
    command = arguments(tmp_path / "out", "--optimizers", "adamw,dopr-adamw+exclude=[nothere]", "--seeds=0")
    assert main(command) == 2
    assert "exclude: 'nothere' matches no module with parameters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_of_level_rates_the_one_of_lowest_loss_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Success rates of few episodes are often the same."""

    def made_up(wanted: Sequence[Trial], workers: int) -> list[Record]:
        return [Record(t.config["model"]["optimizer"]["lr"], [1.0, 1.0], 1.0, t.settings) for t in wanted]

    monkeypatch.setattr(compare, "run_all", made_up)
    more = ("--optimizers", "adamw", "--seeds", "0", "--learning-rates", "1e-2,1e-3,3e-2")
    assert main(arguments(tmp_path / "out", *more)) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arms"][0]["lr"] == 1e-3
    assert "end of the grid" not in capsys.readouterr().out


def test_a_rate_that_diverges_in_tuning_is_no_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(wanted: Sequence[Trial], workers: int) -> list[Outcome]:
        return [
            Failure("diverged", diverged=True)
            if t.config["model"]["optimizer"]["lr"] == 1.0
            else Record(1.0, [1.0, 2.0], 1.0, t.settings)
            for t in wanted
        ]

    monkeypatch.setattr(compare, "run_all", made_up)
    tuned = ("--optimizers", "adamw", "--seeds", "0")
    assert main(arguments(tmp_path / "out", *tuned, "--learning-rates", "1,1e-3")) == 0
    (arm,) = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert arm["lr"] == 1e-3
    assert arm["tuning"][0] == {"lr": 1.0, "failed": "diverged"}
    assert main(arguments(tmp_path / "all", *tuned, "--learning-rates", "1")) == 2
