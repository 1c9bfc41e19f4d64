"""``dopr sweep`` from end to end on the toy task, what it does with bad runs, and ``--mup.from_sweep``."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from sweep_tasks import shares_in
from toy_environment import Toy
from toy_task import CONFIG, FIRST_SEED, ToyTask, arguments, train
from toy_views import VIEWS

from dopr_lightning.cli import main as cli
from dopr_lightning.errors import UserError
from dopr_lightning.experiments import runner
from dopr_lightning.experiments.display import Display
from dopr_lightning.experiments.runner import KILLED, attempt, attempt_all
from dopr_lightning.experiments.sweep import main as sweep
from dopr_lightning.experiments.trial import Failure, Outcome, Record, Trial, load_outcome
from dopr_lightning.training import resolve

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

RATES = (0.005, 0.01, 0.02)
GRID = ("--learning-rates", ",".join(map(str, RATES)), "--widths", "8,16", "--trainer.max_steps", "8")
DAMPED = ("--trainer.callbacks+=dopr_lightning.DoPr", "--trainer.callbacks.damping=0.01")


def in_this_process(trials: Sequence[Trial], display: Display) -> dict[str, Outcome]:
    """An engine without worker processes, which take seconds to start."""
    outcomes = {}
    for trial in trials:
        display.progress(trial.name, 0, 1)
        outcomes[trial.name] = runner.attempt(trial, display.progress)
        display.finished(trial.name, outcomes[trial.name])
    return outcomes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_in_processes", in_this_process)


def run(output: Path, *more: str) -> dict[str, Any]:
    sweep.main(["--config", CONFIG, "--output", str(output), "--seeds", "0", *more])
    return json.loads((output / "results.json").read_text())


def stamps(output: Path) -> dict[str, int]:
    found = [*output.rglob("record.json"), *output.rglob("diverged.json")]
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in found}


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Another one, which finds what tests find."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE, **options)


def command(output: Path, *more: str, **options: Any) -> subprocess.Popen[str]:
    """``dopr sweep`` of two seeds in a process of its own."""
    code = "import sys; from dopr_lightning.cli import main; sys.exit(main())"
    return python("-c", code, "sweep", f"--config={CONFIG}", f"--output={output}", "--seeds=0,1", *more, **options)


def kill_midway(process: subprocess.Popen[str], output: Path) -> dict[str, int]:
    """By SIGKILL, which nothing can catch, once a run has finished; returns what has."""
    while not stamps(output) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    return stamps(output)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of DoPr-AdamW under muP alone."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_in_processes", in_this_process)
        run(output, *GRID, "--optimizer", "dopr-adamw", "--parametrizations", "mup")
    return output


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    Toy.resets.clear()
    results = run(output, *GRID, "--optimizer", "dopr-adamw", "--recommend-width", "32")
    assert Toy.resets == []
    said = capsys.readouterr().out
    assert "[1/12] mup width 8 lr 0.005 wd 1e-05 damping 0.01 seed 0: val loss" in said
    assert " left\n" in said
    assert "│ standard " in said
    assert (results["task"], results["optimizer"], results["seeds"]) == ("DoprToy-v0", "dopr-adamw", [0])
    assert results["centre"] == {"lr": 0.01, "weight_decay": 1e-5, "damping": 0.01}
    assert [entry["network"] for entry in results["widths"]] == [{"width": 8}, {"width": 16}]
    parameters = [entry["parameters"] for entry in results["widths"]]
    assert results["budget"]["compute_of_narrowest_relative_to_widest"] == parameters[0] / parameters[1]
    with Image.open(output / "transfer.png") as picture:
        assert picture.width > 1000  # muP beside standard

    trials = {(t["parametrization"], t["width"], t["lr"]): t for t in results["trials"]}
    assert set(trials) == {(p, w, lr) for p in ("mup", "standard") for w in (8, 16) for lr in RATES}
    for (parametrization, width, lr), trial in trials.items():
        name = f"{parametrization}/width-{width}/lr-{lr:g}-wd-1e-05-damping-0.01/seed-0"
        folder = output / "runs" / name
        record = json.loads((folder / "record.json").read_text())
        assert trial["val_loss"] == record["val_loss"]
        assert (record["episodes"], trial["rollout"], trial["failed"]) == ([], None, None)
        model = record["settings"]["config"]["model"]
        assert model["optimizer"]["lr"] == lr
        assert model["network"]["init_args"]["width"] == width
        assert (model.get("mup") or {}).get("base") == ({"width": 8} if parametrization == "mup" else None)
        assert not list(folder.rglob("*.ckpt"))
    # At its base width too: muP's readouts start at zero.
    for width in (8, 16):
        for lr in RATES:
            assert trials["mup", width, lr]["val_loss"] != trials["standard", width, lr]["val_loss"]
    assert [(t["parametrization"], t["hyperparameter"], t["metric"]) for t in results["transfer"]] == [
        ("mup", "lr", "val_loss"),
        ("standard", "lr", "val_loss"),
    ]
    for transfer in results["transfer"]:
        assert transfer["values"] == list(RATES)
        for row in transfer["widths"]:
            losses = [trials[transfer["parametrization"], row["width"], lr]["val_loss"] for lr in RATES]
            assert row["numbers"] == [[loss] for loss in losses]
            assert row["at_edge"] == (losses.index(min(losses)) != 1)
            assert RATES[0] * 0.999 <= row["best"] <= RATES[2] * 1.001
    best = results["transfer"][0]["widths"][-1]["best"]
    assert results["recommended"] == {
        "width": 32,
        "network": {"width": 32},
        "lr": pytest.approx(best, rel=1e-3),
        "weight_decay": 1e-5,
        "damping": 0.01,
        "lr_by_role": {},
        "mup": {"base": {"width": 8}, "weight_decay": "independent", "zero_readouts": True},
        "apart": [],
        "by": "val_loss",
        "at_edge": ["lr"] if results["transfer"][0]["widths"][-1]["at_edge"] else [],
    }

    # The same again: nothing is trained. One more width and seed: only theirs. Fewer: refused.
    before = stamps(output)
    assert len(before) == 12
    assert run(output, *GRID, "--optimizer", "dopr-adamw", "--recommend-width", "32") == results
    assert stamps(output) == before
    with pytest.raises(UserError, match=r"results.json also has width 16, lr 0.005, standard; name them again"):
        run(output, *GRID, "--optimizer=dopr-adamw", "--parametrizations=mup", "--widths=8", "--learning-rates=.01,.02")
    run(output, *GRID, "--optimizer", "dopr-adamw", "--widths", "8,16,24")
    after = stamps(output)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[2] for name in after.keys() - before.keys()} == {"width-24"}

    # Another configuration, another base: refused, and nothing changes.
    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for more, difference in (
        (("--data.batch_size=6",), "data.batch_size: 12 -> 6"),
        (("--model.network.depth=2",), "model.network.init_args.depth: 1 -> 2"),
        (("--widths=4,8,16,24",), "base_width: 8 -> 4"),
        (("--episodes=2",), "episodes: 0 -> 2"),
        (("--trainer.precision=bf16-mixed",), "trainer.precision: unset -> bf16-mixed"),
        (("--trainer.devices=2",), "trainer.devices: 1 -> 2"),
    ):
        with pytest.raises(UserError, match=rf"holds a run with other settings \(.*{difference}"):
            run(output, *GRID, "--optimizer", "dopr-adamw", *more)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == files


LINES = ("--learning-rates=0.005,0.01,0.02", "--weight-decays=1e-5,1e-3")
PRODUCT = (*LINES, "--grid=product")
DECAYED = "--model.optimizer.weight_decay=1e-3"
FASTER = "--model.optimizer.lr=0.02"


@pytest.mark.parametrize(
    ("first", "then", "lost"),
    [
        (PRODUCT, LINES, "--grid product"),
        (LINES, PRODUCT, None),
        # A product of one is a line.
        ((*GRID[:2], "--grid=product"), GRID[:2], None),
        ((*GRID[:2], "--grid=product"), (*GRID[:2], DECAYED), "centre weight_decay 1e-05"),
        (GRID[:2], (*GRID[:2], DECAYED), "centre weight_decay 1e-05"),
        # Its own centre is nowhere on a line, but another's is.
        (GRID[:2], (*GRID[:2], FASTER), None),
        (LINES, (*LINES, FASTER), "centre lr 0.01"),
        (LINES, (*LINES, FASTER, DECAYED), "centre lr 0.01, centre weight_decay 1e-05"),
        (PRODUCT, (*PRODUCT, FASTER, DECAYED), None),
        # What ran at the old centre of all is among the values that are swept now, or is not.
        (GRID[:2], (*PRODUCT, DECAYED), None),
        (GRID[:2], (*GRID[:2], "--weight-decays=1e-4,1e-3", "--grid=product"), "centre weight_decay 1e-05"),
        (GRID[:2], (*LINES, DECAYED), "centre weight_decay 1e-05"),
        # No share of the rate is all of it.
        (GRID[:2], (*GRID[:2], "--input-rates=0.5,1", "--grid=product"), None),
        (GRID[:2], (*GRID[:2], "--input-rates=0.25,0.5", "--grid=product"), "centre input_rate 1.0"),
        (GRID[:2], (*GRID[:2], "--model.optimizer.lr_by_role.input=0.5"), "centre input_rate 1.0"),
    ],
)
def test_results_are_not_replaced_by_fewer_combinations(
    first: tuple[str, ...],
    then: tuple[str, ...],
    lost: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "attempt_all", made_up(lambda config: 1 + config["model"]["optimizer"]["lr"], []))
    one = ("--widths=8", "--parametrizations=mup", "--optimizer=adamw")
    run(tmp_path, *one, *first)
    before = (tmp_path / "results.json").read_bytes()
    if lost is None:
        run(tmp_path, *one, *then)
        return
    with pytest.raises(UserError, match=rf"results.json also has {lost}; name them again too, or choose another"):
        run(tmp_path, *one, *then)
    assert (tmp_path / "results.json").read_bytes() == before


def test_rollouts_judge_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Toy.resets.clear()
    results = run(tmp_path, *GRID, "--optimizer=adamw", "--parametrizations=mup", "--episodes=2")
    # None on the way, and at the end as many as were asked for, whatever the configuration says.
    assert Toy.resets == [FIRST_SEED, FIRST_SEED + 1] * 6
    assert ", rollouts " in capsys.readouterr().out
    assert (results["metric"], results["budget"]["episodes_per_run"]) == ("return", 2)
    measured = {}
    for trial in results["trials"]:
        folder = tmp_path / f"runs/mup/width-{trial['width']}/lr-{trial['lr']:g}-wd-1e-05/seed-0"
        returns = [json.loads(line)["return"] for line in (folder / "rollouts.jsonl").read_text().splitlines()]
        assert len(set(returns)) == 2
        assert trial["rollout"] == pytest.approx(statistics.mean(returns))
        measured[trial["width"], trial["lr"]] = {"val_loss": trial["val_loss"], "return": trial["rollout"]}
    assert [transfer["metric"] for transfer in results["transfer"]] == ["val_loss", "return"]
    for transfer in results["transfer"]:
        for row in transfer["widths"]:
            assert row["numbers"] == [[measured[row["width"], lr][transfer["metric"]]] for lr in RATES]


def test_killed_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its third run, after a checkpoint: the first two are not run again, the third goes on."""
    few = (*GRID, "--parametrizations", "mup", "--optimizer", "adamw")
    steps: list[tuple[str, int]] = []

    def killed(trial: Trial, report: Callable[[str, int, int], None]) -> Outcome:
        def kill(name: str, step: int, total: int) -> None:
            steps.append((name, step))
            if len(steps) == 2 * 8 + 6:
                raise KeyboardInterrupt
            report(name, step, total)

        return attempt(trial, kill)

    monkeypatch.setattr(runner, "attempt", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path, *few)
    assert not (tmp_path / "results.json").exists()
    before = stamps(tmp_path)
    assert len(before) == 2
    results = run(tmp_path, *few)
    assert {name: stamps(tmp_path)[name] for name in before} == before
    assert len(stamps(tmp_path)) == 6
    third = [step for name, step in steps if "width 8 lr 0.02 " in name]
    assert third == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]  # checkpoints are saved every 4 steps
    assert all(trial["val_loss"] for trial in results["trials"])


def test_what_diverges_is_infinitely_bad_and_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sgd = ("--optimizer", "sgd", "--parametrizations", "mup", "--widths", "8,16", "--trainer.max_steps", "8")
    with pytest.raises(UserError, match=r"^all 4 runs failed, mup width 8 lr 1e\+30 .*: diverged: the training loss"):
        run(tmp_path, *sgd, "--learning-rates", "1e30,1e31")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recommended"] is None
    assert not (tmp_path / "recommended.yaml").exists()
    assert all(trial["failed"].startswith("diverged: ") and trial["val_loss"] is None for trial in results["trials"])
    assert [row["best"] for row in results["transfer"][0]["widths"]] == [None, None]
    assert "all 2 runs failed" in capsys.readouterr().out
    assert (tmp_path / "transfer.png").exists()
    before = stamps(tmp_path)
    assert len(before) == 4
    for path in before:
        assert "Traceback" in (tmp_path / path).with_name("log.txt").read_text()

    # With a rate that trains: its runs alone are run.
    results = run(tmp_path, *sgd, "--learning-rates", "1e-2,1e30,1e31")
    assert {name: stamps(tmp_path)[name] for name in before} == before
    assert results["recommended"]["lr"] == 0.01
    (transfer,) = results["transfer"]
    assert [[numbers[0] is None for numbers in row["numbers"]] for row in transfer["widths"]] == [
        [False, True, True]
    ] * 2
    out = capsys.readouterr().out
    assert "4 of 6 runs diverged" in out
    assert "[4/6]" not in out
    assert "[5/6] mup width 8 lr 0.01" in out


def test_an_error_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is kept and shown; nothing is recommended until it is mended."""
    few = (*GRID, "--parametrizations", "mup", "--optimizer", "adamw")

    def faulty(trial: Trial, report: Any) -> Outcome:
        return Failure("OSError: no space") if "width 16 lr 0.01" in trial.name else attempt(trial, report)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "attempt", faulty)
        with pytest.raises(UserError, match=r"^1 of 6 runs failed, mup width 16 .*: OSError: no space; see log"):
            run(tmp_path, *few)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recommended"] is None
    assert [trial["failed"] for trial in results["trials"]].count("OSError: no space") == 1
    assert len(stamps(tmp_path)) == 5
    assert run(tmp_path, *few)["recommended"] is not None

    # What was recommended before an error is so no longer.
    assert (tmp_path / "recommended.yaml").exists()
    with monkeypatch.context() as patch:
        patch.setattr(runner, "attempt", lambda trial, report: Failure("OSError: no space"))
        with pytest.raises(UserError, match="2 of 8 runs failed"):
            run(tmp_path, *few, "--learning-rates", "0.005,0.01,0.02,0.04")
    assert not (tmp_path / "recommended.yaml").exists()

    # Workers that were killed say nothing of their hyperparameters: what there was stays.
    before = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr(runner, "attempt", lambda trial, report: KILLED)
    with pytest.raises(UserError, match=r"2 of 8 runs were stopped: .*the same command goes on with them"):
        run(tmp_path, *few, "--learning-rates", "0.005,0.01,0.02,0.04")
    assert (tmp_path / "results.json").read_bytes() == before


def made_up(losses: Callable[[dict[str, Any]], float], seen: list[Trial]) -> Callable[..., list[Outcome]]:
    def attempt_all(trials: Sequence[Trial], workers: int, engine: Any) -> list[Outcome]:
        seen.extend(trials)
        outcomes: list[Outcome] = []
        for trial in trials:
            loss = losses(trial.config)
            # The closed loop asks for four times the rate that the loss does.
            returns = [100 - losses({**trial.config, "shift": 2})] * trial.episodes
            outcomes.append(Record(loss, returns, 1.0, trial.settings))
        return outcomes

    return attempt_all


def bowl(config: dict[str, Any]) -> float:
    """Best at rate 0.01 and damping 0.1 at any width under muP; a rate inversely as the width without."""
    optimizer, mup = config["model"]["optimizer"], config["model"].get("mup")
    width = config["model"]["network"]["init_args"]["channels"][0]
    best = 0.01 * 2 ** config.get("shift", 0) * (1.0 if mup else 8 / width)
    damping = config["trainer"]["callbacks"][0]["init_args"]["damping"]
    return 1 + math.log2(optimizer["lr"] / best) ** 2 + 0.1 * math.log2(damping / 0.1) ** 2


UNET = (
    "--model.network=dopr_lightning.policies.networks.ConditionalUnet1d",
    "--model.network.channels=[32,64]",
    "--model.network.condition_dim=64",
)

TRANSFORMER = (
    "--model.network=dopr_lightning.policies.networks.ActionTransformer",
    "--model.network.depth=1",
    "--model.network.heads=4",
)


@pytest.mark.parametrize("grid", ["lines", "product"])
def test_the_report_says_what_the_losses_do(
    grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials: list[Trial] = []
    monkeypatch.setattr(sweep, "attempt_all", made_up(bowl, trials))
    more = ("--optimizer=dopr-muon", "--widths=8,32", "--lr-octaves=3", "--dampings=0.025,0.05,0.1,0.2,0.4", *UNET)
    results = run(tmp_path, *more, "--episodes=2", f"--grid={grid}", "--seeds=0,1")
    assert len(trials) == 2 * 2 * 2 * ((13 + 5) if grid == "lines" else 13 * 5)
    assert len({trial.folder for trial in trials}) == len({trial.name for trial in trials}) == len(trials)
    rates = sorted({trial.config["model"]["optimizer"]["lr"] for trial in trials})
    assert rates[0] == 0.01 / 8
    assert rates[-1] == 0.01 * 8
    for trial in trials:
        width = int(trial.name.split()[2])
        assert trial.config["model"]["network"]["init_args"]["channels"] == [width, 2 * width]
        assert trial.config["model"]["network"]["init_args"]["condition_dim"] == 2 * width
        base = (trial.config["model"].get("mup") or {}).get("base")
        assert base == ({"channels": [8, 16], "condition_dim": 16} if trial.name.startswith("mup") else None)
        assert trial.config["model"]["optimizer"]["base"] == "muon"
        assert trial.config["rollout"]["episodes"] == 0
        assert (trial.episodes, trial.first_seed, trial.keep_checkpoints) == (2, FIRST_SEED, False)
    for trial in trials[:: len(trials) // 3]:
        assert trial.config == resolve(trial.arguments)
    assert {trial.cost for trial in trials if "width 8 " in trial.name} < {trial.cost for trial in trials}

    found = {(t["parametrization"], t["hyperparameter"], t["metric"]): t for t in results["transfer"]}
    assert len(found) == 2 * 2 * 2
    narrow, wide = found["mup", "lr", "val_loss"]["widths"]
    assert narrow["best"] == pytest.approx(0.01)
    assert (wide["drift"], wide["regret"]) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-9))
    # On the closed loop the best rate is another one, and as transferable.
    narrow, wide = found["mup", "lr", "return"]["widths"]
    assert narrow["best"] == pytest.approx(0.04)
    damped = 0.0 if grid == "product" else 0.1 * 3.3219**2  # the centre's damping is 0.01
    assert narrow["loss"] == pytest.approx(99 - damped, abs=1e-3)
    assert wide["drift"] == pytest.approx(0, abs=1e-6)
    # Standard: two octaves lower at four times the width, and the narrow rate costs 2^2 there.
    narrow, wide = found["standard", "lr", "val_loss"]["widths"]
    assert wide["drift"] == pytest.approx(-2)
    assert wide["drift_ci95"] == pytest.approx([-2, -2])
    assert wide["regret"] == pytest.approx(4 / (1 + damped), rel=1e-3)
    assert found["mup", "damping", "val_loss"]["widths"][1]["best"] == pytest.approx(0.1)
    assert found["standard", "damping", "val_loss"]["max_drift"] == pytest.approx(0, abs=1e-6)

    assert results["recommended"]["lr"] == pytest.approx(0.01, rel=1e-3)
    assert results["recommended"]["damping"] == pytest.approx(0.1, rel=1e-3)
    # The file is the recommended run, whatever is below it.
    config = resolve([f"--config={CONFIG}", f"--config={tmp_path / 'recommended.yaml'}"])
    assert config["model"]["network"]["init_args"]["channels"] == [32, 64]
    assert config["model"]["mup"]["base"] == {"channels": [8, 16], "condition_dim": 16}
    assert config["model"]["optimizer"]["base"] == "muon"
    assert config["trainer"]["callbacks"][0]["init_args"]["damping"] == pytest.approx(0.1, rel=1e-3)
    # By rollouts the same runs recommend the rate that these ask for.
    by_rollouts = run(tmp_path, *more, "--episodes=2", f"--grid={grid}", "--seeds=0,1", "--recommend-by=rollouts")
    assert by_rollouts["recommended"]["by"] == "return"
    assert by_rollouts["recommended"]["lr"] == pytest.approx(0.04, rel=1e-3)
    assert "it goes by return (--recommend-by); the best would be learning rate 0.01" in capsys.readouterr().out
    config = resolve([f"--config={CONFIG}", f"--config={tmp_path / 'recommended.yaml'}"])
    assert config["model"]["optimizer"]["lr"] == pytest.approx(0.04, rel=1e-3)


def test_how_a_configuration_chooses_and_judges_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep keeps none to choose; a first seed of the file's judges its runs."""
    trials: list[Trial] = []
    monkeypatch.setattr(sweep, "attempt_all", made_up(lambda config: 1.0, trials))
    file = tmp_path / "chosen.yaml"
    file.write_text(
        "checkpoint: {monitor: rollout/return, mode: max, save_top_k: 3}\nrollout: {first_seed: 500, episodes: 5}\n"
    )
    run(tmp_path / "out", *GRID, "--optimizer=adamw", f"--config={file}", "--episodes=2")
    for trial in trials:
        checkpoint = trial.config["checkpoint"]
        assert (checkpoint.get("monitor"), checkpoint["save_top_k"], checkpoint["save_last"]) == (None, 1, True)
        assert (trial.first_seed, trial.config["rollout"]["episodes"]) == (500, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--widths=8,x",), "--widths 8,x: give numbers"),
        (("--widths=0,8",), "a width is a positive whole number"),
        ((*UNET, "--widths=8,12"), r"--widths 12: .*channels \[12, 24\] must be positive multiples of groups 8"),
        ((*UNET, "--widths=8,16", "--model.network.condition_dim=21"), r"--widths 8: .*not a whole number; .* of 32"),
        ((*TRANSFORMER, "--widths=8,10"), "--widths 10: .*width 10 is not a multiple of heads 4"),
        ((*VIEWS, "--model.network.encoder_width=12", "--widths=8,12"), "--widths 12: .*width 18 is not a multiple"),
        ((*VIEWS, "--model.network.encoder_width=4", "--widths=8,9"), r"--widths 9: encoder_width would be 4 x 9 / 8,"),
        (("--model.network=torch.nn.Linear",), "Linear|network"),
        (("--dampings=0.1",), "there is no DoPr in this configuration; use --optimizer dopr-adamw"),
        (("--weight-decays=0,1e-3",), "--weight-decays 0,1e-3: values must be positive"),
        (("--learning-rates=1e-3", "--lr-octaves=1"), "both say which learning rates"),
        (("--optimizer=adamw,muon",), "a sweep is of one optimizer"),
        (("--optimizer=adamw", "--model.optimizer.base=muon"), "are the same thing"),
        (("--optimizer=dopr-adamw", *DAMPED), "DoPr"),
        (("--parametrizations=mup,sp",), "mup, standard, or mup,standard"),
        (("--model.mup.base={width: 4}",), "--model.mup.base is what a sweep sets itself; use --widths"),
        (("--checkpoint.dirpath=there",), "--checkpoint.dirpath is what a sweep sets itself; use --output"),
        (("--gpus-per-trial=0.25",), "add --engine ray"),
        (("--recommend-width=4",), "--recommend-width 4 is less than the narrowest"),
        (("--episodes=-1",), "--episodes -1"),
        (("--recommend-by=rollouts",), "--recommend-by rollouts: there are none; add --episodes 20"),
    ],
)
def test_mistakes_show_before_anything_trains(more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", *("--widths", "8,16"), *more)
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_other_demonstrations_is_left_alone(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ToyTask.load
    monkeypatch.setattr(ToyTask, "load", lambda self: replace(whole(self), sha256="def"))
    before = stamps(finished)
    with pytest.raises(UserError, match="with sha256 abc, and here they have def: the data changed"):
        run(finished, *GRID, "--optimizer", "dopr-adamw", "--parametrizations", "mup")
    assert stamps(finished) == before


def test_a_wide_run_takes_the_numbers_of_the_sweep(finished: Path, tmp_path: Path) -> None:
    recommended = json.loads((finished / "results.json").read_text())["recommended"]
    wide = ("--model.network.width=32", "--trainer.max_steps=4", *DAMPED[:1])
    by_sweep = train(tmp_path / "sweep", *wide, "--mup.from_sweep", str(finished))
    explicit = train(
        tmp_path / "explicit",
        *wide,
        '--model.mup.base={"width": 8}',
        f"--model.optimizer.lr={recommended['lr']}",
        f"--model.optimizer.weight_decay={recommended['weight_decay']}",
    )
    standard = train(tmp_path / "standard", *wide, f"--model.optimizer.lr={recommended['lr']}")
    weights = [run.model.state_dict() for run in (by_sweep, explicit, standard)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert not torch.equal(weights[0]["network.readout.weight"], weights[2]["network.readout.weight"])
    rates = {group["lr_mult"] for group in by_sweep.trainer.optimizers[0].param_groups}
    assert rates == {1.0, 0.25}
    # The sweep's own file is the same run.
    stacked = resolve([f"--config={CONFIG}", f"--config={finished / 'recommended.yaml'}", "--model.network.width=32"])
    swept = resolve([f"--config={CONFIG}", *DAMPED[:1], "--model.network.width=32", f"--mup.from_sweep={finished}"])
    assert stacked["model"] == swept["model"]
    assert stacked["trainer"]["callbacks"] == swept["trainer"]["callbacks"]


def test_lists_of_channels_are_taken_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "attempt_all", made_up(bowl, []))
    values = ("--learning-rates=0.0025,0.005", "--dampings=0.1,0.2")
    run(tmp_path, "--optimizer=dopr-adamw", "--parametrizations=mup", "--widths=8,16", *values, *UNET)

    def wide(channels: str, condition_dim: int, *how: str) -> dict[str, Any]:
        size = (f"--model.network.channels={channels}", f"--model.network.condition_dim={condition_dim}")
        return resolve([f"--config={CONFIG}", *DAMPED[:1], *UNET, *size, *how])

    base = '--model.mup.base={"channels": [8, 16], "condition_dim": 16}'
    found = ("--model.optimizer.lr=0.005", "--trainer.callbacks.damping=0.1")
    taken = f"--mup.from_sweep={tmp_path}"
    assert wide("[64,128]", 128, taken) == wide("[64,128]", 128, base, *found)
    with pytest.raises(UserError, match=r"channels \[16, 8\] is narrower than the sweep's base, \[8, 16\]; widen it"):
        wide("[16,8]", 32, taken)
    with pytest.raises(UserError, match=r"condition_dim 8 is narrower than the sweep's base, 16; widen it"):
        wide("[16,32]", 8, taken)
    with pytest.raises(
        UserError, match=r"channels \[16, 32, 64\] has not as many entries as the sweep's base, \[8, 16\]"
    ):
        wide("[16,32,64]", 32, taken)


def test_a_best_value_at_its_grids_end_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the widest width, whose best is recommended; the narrower one's rate lies within its grid."""

    def losses(config: dict[str, Any]) -> float:
        best = {8: 0.01, 16: 0.04}[config["model"]["network"]["init_args"]["width"]]
        damping = config["trainer"]["callbacks"][0]["init_args"]["damping"]
        return 1 + math.log2(config["model"]["optimizer"]["lr"] / best) ** 2 + math.log2(damping / 0.1) ** 2

    monkeypatch.setattr(sweep, "attempt_all", made_up(losses, []))
    few = ("--widths=8,16", "--optimizer=dopr-adamw", "--parametrizations=mup")

    def taken() -> str:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            resolve([f"--config={CONFIG}", *DAMPED[:1], f"--mup.from_sweep={tmp_path}"])
        return "".join(str(warning.message) for warning in seen if "LightningCLI" not in str(warning.message))

    rates = "--learning-rates=0.005,0.01,0.02"
    results = run(tmp_path, *few, rates, "--dampings=0.05,0.1,0.2", "--weight-decays=1e-5")
    said = "lr 0.02: at the grid's end, so better may lie beyond; sweep a wider grid"
    assert results["recommended"]["at_edge"] == ["lr"]  # of the one weight decay there is no more to say
    assert f"warning: {said}\n" in capsys.readouterr().out
    assert taken() == f"--mup.from_sweep {tmp_path}: {said}"
    del results["recommended"]["at_edge"]  # as in older results
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert taken() == ""

    results = run(tmp_path, *few, f"{rates},0.04,0.08", "--dampings=0.05,0.1,0.2", "--weight-decays=1e-5")
    assert results["recommended"]["at_edge"] == []
    assert results["recommended"]["apart"] == ["lr", "damping"]
    out = capsys.readouterr().out
    assert "at the grid's end" not in out
    assert "warning: no run had its lr and damping together" in out
    assert taken() == ""


def test_rates_of_roles_are_swept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best: a quarter for the input layers. The rest has the configuration's number, as a wide run then has."""

    def losses(config: dict[str, Any]) -> float:
        shares = config["model"]["optimizer"]["lr_by_role"]
        assert shares["readout"] == 0.5
        return 1 + math.log2(shares["input"] / 0.25) ** 2

    trials: list[Trial] = []
    monkeypatch.setattr(sweep, "attempt_all", made_up(losses, trials))
    readout = "--model.optimizer.lr_by_role={input: 1.0, readout: 0.5}"
    results = run(tmp_path, "--widths=8,16", "--input-rates=0.125,0.25,0.5,1", "--optimizer=dopr-adamw", readout)
    assert len({trial.folder for trial in trials}) == len(trials) == 2 * 2 * 4
    for trial in trials[::5]:
        assert trial.config == resolve(trial.arguments)
    (ours, _) = results["transfer"]
    assert ours["hyperparameter"] == "input_rate"
    assert [row["best"] for row in ours["widths"]] == pytest.approx([0.25, 0.25])
    assert results["recommended"]["lr_by_role"] == {"input": 0.25, "readout": 0.5}
    wide = resolve([f"--config={CONFIG}", *DAMPED[:1], "--model.network.width=32", f"--mup.from_sweep={tmp_path}"])
    assert wide["model"]["optimizer"]["lr_by_role"] == {"input": 0.25, "readout": 0.5}
    with pytest.raises(UserError, match=r"--model.optimizer.lr_by_role.input and --mup.from_sweep say the same thing"):
        resolve([f"--config={CONFIG}", "--model.optimizer.lr_by_role.input=1", f"--mup.from_sweep={tmp_path}"])
    with pytest.raises(UserError, match=r"--input-rates 0,1: values must be positive"):
        run(tmp_path / "other", "--widths=8,16", "--input-rates=0,1")


def test_fit_takes_them_from_the_command_line(finished: Path, tmp_path: Path) -> None:
    recommended = json.loads((finished / "results.json").read_text())["recommended"]
    more = (*DAMPED[:1], "--model.network.width=32", "--trainer.max_steps=4", "--rollout.report_episodes=0")
    assert cli(["fit", *arguments(tmp_path, *more, f"--mup.from_sweep={finished}")]) == 0
    parameters = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert parameters["optimizer"]["lr"] == recommended["lr"]
    assert parameters["mup"] == recommended["mup"]
    assert cli(["fit", *arguments(tmp_path, "--model.network.width=32", f"--mup.from_sweep={finished}")]) == 2


def test_the_dampings_best_is_taken_too(finished: Path, tmp_path: Path) -> None:
    other = shutil.copytree(finished, tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    results["recommended"] |= {"damping": 0.37, "weight_decay": 0.02}
    (other / "results.json").write_text(json.dumps(results))
    config = resolve([f"--config={CONFIG}", *DAMPED[:1], f"--mup.from_sweep={other}"])
    assert config["trainer"]["callbacks"][0]["init_args"]["damping"] == 0.37
    assert config["model"]["optimizer"]["weight_decay"] == 0.02
    assert "from_sweep" not in yaml.safe_dump(config)  # the folder may go


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "callbacks: DoPr -> no DoPr"),
        ((*DAMPED, "--model.optimizer.base=muon"), "model.optimizer.base: adamw -> muon"),
        ((*DAMPED, "--model.network.depth=2"), r"depth: 1 -> 2\); mend this one, or put the sweep's own before it"),
        ((*DAMPED, *UNET), "class_path: .*ResidualMLP -> .*ConditionalUnet1d"),
        ((*DAMPED, "--data.source.observation_dim=3"), "data.source.init_args.observation_dim: 2 -> 3"),
        ((*DAMPED, "--trainer.callbacks.update_every=3"), "trainer.dopr.update_every: 1 -> 3"),
        ((*DAMPED, "--trainer.accumulate_grad_batches=16"), "trainer.accumulate_grad_batches: unset -> 16"),
        ((*DAMPED, "--trainer.gradient_clip_algorithm=value"), "trainer.gradient_clip_algorithm: unset -> value"),
        ((*DAMPED, "--model.network.width=4"), "width 4 is narrower than the sweep's base, 8"),
        ((*DAMPED, "--model.optimizer.lr=1e-3"), "--model.optimizer.lr and --mup.from_sweep say the same thing"),
        (("--trainer.callbacks+=dopr_lightning.DoPr", "--model.mup.base={width: 8}"), "--model.mup.base and"),
    ],
)
def test_a_sweep_of_another_configuration_is_refused(more: tuple[str, ...], message: str, finished: Path) -> None:
    undamped = [word for word in more if "damping" not in word]
    with pytest.raises(UserError, match=message):
        resolve([f"--config={CONFIG}", *undamped, f"--mup.from_sweep={finished}"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model.optimizer={lr: 0.5}",), "--model.optimizer, which sets model.optimizer.lr,"),
        (("--model.optimizer", "{warmup_steps: 1, weight_decay: 0.5}"), "sets model.optimizer.weight_decay,"),
        (("--model.optimizer={lr_by_role: {input: 0.5}}",), "sets model.optimizer.lr_by_role.input,"),
        (("--model={optimizer: {lr: 0.5}}",), "--model, which sets model.optimizer.lr,"),
        (("--trainer.callbacks.init_args.damping=0.5",), "--trainer.callbacks.init_args.damping"),
        (
            ("--trainer.callbacks=[{class_path: dopr_lightning.DoPr, init_args: {damping: 0.5}}]",),
            "--trainer.callbacks, which sets trainer.callbacks.damping,",
        ),
        (
            ("--trainer.callbacks+={class_path: dopr_lightning.DoPr, init_args: {damping: 0.5}}",),
            r"--trainer.callbacks\+, which sets trainer.callbacks.damping,",
        ),
    ],
)
def test_what_the_sweep_gives_is_refused_in_every_form(more: tuple[str, ...], said: str, finished: Path) -> None:
    with pytest.raises(UserError, match=f"{said} and --mup.from_sweep say the same thing; leave one out"):
        resolve([f"--config={CONFIG}", *DAMPED[:1], *more, f"--mup.from_sweep={finished}"])


DAMPED_MORE = "class_path: dopr_lightning.DoPr\ninit_args: {damping: 0.5}"
FILES = {
    "optimizer.yaml": "lr: 0.5",
    "model.yaml": "optimizer: {weight_decay: 0.5}",
    "elsewhere/model.yaml": "optimizer: shares.yaml",
    "elsewhere/shares.yaml": "lr_by_role: {input: 0.5}",
    "callback.yaml": DAMPED_MORE,
    "callbacks.yaml": f"- {DAMPED_MORE}".replace("\n", "\n  "),
}
"""Configuration in files, by their names."""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model.optimizer=optimizer.yaml",), "--model.optimizer, which sets model.optimizer.lr,"),
        (("--model.optimizer", "optimizer.yaml"), "--model.optimizer, which sets model.optimizer.lr,"),
        (("--model=model.yaml",), "--model, which sets model.optimizer.weight_decay,"),
        (("--model={optimizer: optimizer.yaml}",), "--model, which sets model.optimizer.lr,"),
        # What a file names is beside it.
        (("--model=elsewhere/model.yaml",), "--model, which sets model.optimizer.lr_by_role.input,"),
        (("--trainer.callbacks=callbacks.yaml",), "--trainer.callbacks, which sets trainer.callbacks.damping,"),
        (("--trainer.callbacks=[callback.yaml]",), "--trainer.callbacks, which sets trainer.callbacks.damping,"),
        (("--trainer.callbacks+=callback.yaml",), r"--trainer.callbacks\+, which sets trainer.callbacks.damping,"),
    ],
)
def test_what_the_sweep_gives_is_refused_in_files_too(
    more: tuple[str, ...], said: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with pytest.raises(UserError, match=f"{said} and --mup.from_sweep say the same thing; leave one out"):
        resolve([f"--config={CONFIG}", *DAMPED[:1], *more, f"--mup.from_sweep={finished}"])


def test_other_options_of_the_same_things_are_taken(finished: Path) -> None:
    """They are the sweep's, or a default's; what begins with the name of what it gives is another option."""
    recommended = json.loads((finished / "results.json").read_text())["recommended"]
    more = ("--trainer.callbacks.damping_scale=trace", "--model.optimizer={base: adamw, warmup_steps: 2}")
    more += ("--trainer.accumulate_grad_batches=1", "--trainer.gradient_clip_algorithm=norm")
    more += (f"--trainer={{callbacks: [{{class_path: dopr_lightning.DoPr}}], log_every_n_steps: 1{' ' * 300}}}",)
    config = resolve([f"--config={CONFIG}", *DAMPED[:1], *more, f"--mup.from_sweep={finished}"])
    assert config["model"]["optimizer"]["lr"] == recommended["lr"]
    assert config["trainer"]["callbacks"][0]["init_args"]["damping"] == recommended["damping"]


def test_files_of_other_options_are_taken(finished: Path, tmp_path: Path) -> None:
    """Also those that say how the optimizer is, but not what the sweep says."""
    warmup, weights = tmp_path / "warmup.yaml", tmp_path / "weights.ckpt"
    warmup.write_text("{base: adamw, warmup_steps: 2}")
    weights.write_bytes(b"\xff")
    more = (f"--model.optimizer={warmup}", f"--trainer.default_root_dir={tmp_path}", f"--checkpoint.filename={weights}")
    config = resolve([f"--config={CONFIG}", *DAMPED[:1], *more, f"--mup.from_sweep={finished}"])
    assert config["model"]["optimizer"]["warmup_steps"] == 2


def test_the_sweeps_own_before_another_configuration_leaves_it_its_width_and_warm_up(
    finished: Path, tmp_path: Path
) -> None:
    """As the error says to whom misses something of the sweep's, here DoPr and a depth."""
    sweep_of = shutil.copytree(finished, tmp_path / "sweep")
    results = json.loads((sweep_of / "results.json").read_text())
    results["recommended"] |= {"lr": 0.003, "weight_decay": 0.02, "damping": 0.37}
    (sweep_of / "results.json").write_text(json.dumps(results))
    config = yaml.safe_load(Path(CONFIG).read_text())
    config["model"]["network"]["init_args"] = {"width": 64}
    config["model"]["optimizer"] |= {"warmup_steps": 3, "lr": 0.5, "weight_decay": 0.5}
    wide = tmp_path / "wide.yaml"
    wide.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="DoPr -> no DoPr") as refused:
        resolve([f"--config={wide}", f"--mup.from_sweep={sweep_of}"])
    hint = str(refused.value).partition("your width and schedule win: ")[2].replace("YOURS", str(wide)).split()
    more = ("--trainer.max_steps=4", "--rollout.report_episodes=0", f"--mup.from_sweep={sweep_of}")
    assert cli(["fit", *hint, *arguments(tmp_path, *more)[1:]]) == 0
    trained = torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]
    assert trained["network"]["init_args"] == {"width": 64, "depth": 1}
    optimizer = trained["optimizer"]
    assert (optimizer["warmup_steps"], optimizer["lr"], optimizer["weight_decay"]) == (3, 0.003, 0.02)
    assert trained["mup"]["base"] == {"width": 8}
    (dopr,) = resolve([*hint, f"--mup.from_sweep={sweep_of}"])["trainer"]["callbacks"]
    assert dopr["init_args"]["damping"] == 0.37


def test_a_folder_that_is_no_finished_sweep(finished: Path, tmp_path: Path) -> None:
    def take(folder: Path) -> None:
        resolve([f"--config={CONFIG}", *DAMPED[:1], f"--mup.from_sweep={folder}"])

    with pytest.raises(UserError, match=r"no results.json there; give the --output of a finished dopr sweep"):
        take(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"arms": []}))
    with pytest.raises(UserError, match="is not of a dopr sweep"):
        take(tmp_path)
    results = json.loads((finished / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | {"recommended": None}))
    with pytest.raises(UserError, match="this sweep recommends nothing"):
        take(tmp_path)


def test_ray_runs_what_is_missing_and_leaves_what_the_other_engine_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real Ray on this machine. One run is finished before, one diverges, one takes its worker process with it."""
    pytest.importorskip("ray.tune")
    from dopr_lightning.experiments.sweep.ray_engine import ray_engine

    def trial(name: str, *overrides: str) -> Trial:
        arguments = (f"--config={CONFIG}", "--trainer.max_steps=4", "--rollout.episodes=0", *overrides)
        return Trial(name, tmp_path / name, arguments, {"overrides": list(overrides)}, 0, FIRST_SEED, 0)

    trials = [
        trial("before"),
        trial("diverges", "--model.optimizer.base=sgd", "--model.optimizer.lr=1e30"),
        trial("good"),
        trial("killed", "--data.source=toy_task.Killer"),
    ]
    (before,) = attempt_all(trials[:1], 1)
    stamp = stamps(tmp_path)
    outcomes = attempt_all(trials, 1, ray_engine(None, 0.5, 0.0))
    assert outcomes[0] == before
    assert stamps(tmp_path).items() >= stamp.items()
    assert isinstance(outcomes[1], Failure)
    assert outcomes[1].message.startswith("diverged: ")
    assert isinstance(before, Record)
    assert isinstance(outcomes[2], Record)
    assert outcomes[2].val_loss == before.val_loss
    assert load_outcome(trials[2]) == outcomes[2]
    assert outcomes[3] == KILLED
    out = capsys.readouterr().out
    for line in ("1 of 4 runs were finished before", "] good: val loss", "] diverges: diverged", "] killed: a worker"):
        assert line in out


SMALL = ("--widths=8", "--parametrizations=mup", "--trainer.max_steps=8")


def test_a_killed_command_leaves_no_process_and_is_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of its two workers is in the middle of a run, and reports nothing."""
    stuck = ("--data.source=sweep_tasks.Stuck", f"--data.source.first={tmp_path / 'first'}")
    small = (*SMALL, "--learning-rates=0.005,0.01", *stuck)
    with command(tmp_path, *small, "--engine=inline", "--workers=2", start_new_session=True) as first:
        before = kill_midway(first, tmp_path)
        assert 0 < len(before) < 4
        results = run(tmp_path, *small, "--seeds=0,1")
        assert "of 4 runs were finished before" in capsys.readouterr().out
        after = stamps(tmp_path)
        assert len(after) == 4
        assert after.items() >= before.items()
        assert all(trial["val_loss"] for trial in results["trials"])
        try:
            # All that it started writes where it did: the end of that is the end of them, reaped or not.
            first.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(first.pid, signal.SIGKILL)
            raise


def test_a_killed_command_on_a_ray_cluster_is_taken_up_again(tmp_path: Path) -> None:
    """Ray ends the orphaned trial; the same command does what is missing. Each trial has the share that it asks for."""
    pytest.importorskip("ray.tune")
    small = (*SMALL, "--learning-rates=0.005,0.01", "--data.source=sweep_tasks.Shares")
    with python(str(Path(__file__).with_name("ray_cluster.py")), stdin=subprocess.PIPE) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        by_ray = ("--engine=ray", f"--ray-address={address}", "--cpus-per-trial=2", "--gpus-per-trial=0.5")
        with command(tmp_path, *small, *by_ray) as first:
            before = kill_midway(first, tmp_path)
        assert 0 < len(before) < 4
        assert not (tmp_path / "results.json").exists()
        with command(tmp_path, *small, *by_ray) as second:
            said = second.communicate(timeout=300)[0]
        assert second.returncode == 0, said
        assert cluster.poll() is None  # a cluster that was joined goes on
        cluster.communicate(timeout=60)
    assert "of 4 runs were finished before" in said
    after = stamps(tmp_path)
    assert len(after) == 4
    assert after.items() >= before.items()
    for path in after:
        shares = shares_in((tmp_path / path).with_name("log.txt"))
        assert shares == [{"CPU": 2, "GPU": 0.5}] * max(1, len(shares)), path
    results = json.loads((tmp_path / "results.json").read_text())
    losses = {(t["lr"], t["seed"]): t["val_loss"] for t in results["trials"]}
    inline = run(tmp_path / "inline", *small, "--seeds=0,1")
    assert losses == {(t["lr"], t["seed"]): t["val_loss"] for t in inline["trials"]}


@pytest.mark.parametrize(
    ("nodes", "need", "fitting"),
    [
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.25}, 8),
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 0.5, "GPU": 0.0}, 16),
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 1.0}, 2),
        # In floats, 0.3 / 0.1 and 0.7 / 0.1 are less than 3 and 7.
        ([{"CPU": 0.3}, {"CPU": 0.7}], {"CPU": 0.1}, 10),
        ([{"CPU": 1.0, "GPU": 1.0}], {"CPU": 0.1, "GPU": 1 / 3}, 3),
        # What machines have together is no one's.
        ([{"CPU": 2.0}, {"CPU": 2.0}], {"CPU": 3.0}, 0),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}, 2),
        ([{"CPU": 64.0}, {"CPU": 2.0, "GPU": 8.0}], {"CPU": 4.0, "GPU": 1.0}, 0),
        ([{"CPU": 64.0}, {"CPU": 2.0, "GPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}, 2),
        ([], {"CPU": 1.0}, 0),
    ],
)
def test_how_many_trials_fit_on_machines(nodes: list[dict[str, float]], need: dict[str, float], fitting: int) -> None:
    from dopr_lightning.experiments.sweep.ray_engine import how_many_fit

    assert how_many_fit(nodes, need) == fitting


def test_ray_without_a_machine_that_is_large_enough_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would wait for one to come."""
    ray = pytest.importorskip("ray")
    from dopr_lightning.experiments.sweep.ray_engine import _parallel

    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"CPU": 16.0, "memory": 1e9}},
        {"Alive": False, "Resources": {}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert _parallel(4.0, 0.0) == 6
    assert _parallel(4.0, 1.0) == 2
    with pytest.raises(UserError, match=r"--gpus-per-trial 3: none of .*; the largest has 8 CPUs and 2 GPUs; ask for"):
        _parallel(1.0, 3.0)
    with pytest.raises(UserError, match=r"--cpus-per-trial 10 --gpus-per-trial 1: .* largest has 8 CPUs and 2 GPUs;"):
        _parallel(10.0, 1.0)
    with pytest.raises(UserError, match=r"--cpus-per-trial 20 .* the largest has 16 CPUs and 0 GPUs; ask for less"):
        _parallel(20.0, 0.0)
