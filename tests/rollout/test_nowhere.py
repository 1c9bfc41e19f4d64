"""Demonstrations without an environment: training goes on without rollouts and says so; what judges by them refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from toy_task import CONFIG, train

from dopr_lightning.cli import main

NOWHERE = "--data.source=toy_task.Nowhere"
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


def test_it_trains_and_says_once_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dopr_lightning"):
        cli = train(tmp_path, NOWHERE)
        cli.after_fit()
    assert cli.trainer.global_step == 20
    assert "test/loss" in cli.trainer.callback_metrics
    assert not [name for name in cli.trainer.callback_metrics if name.startswith("rollout/")]
    (said,) = (record.message for record in caplog.records if "rollouts" in record.message)
    assert "names no environment" in said
    assert "give the source an environment" in said
    assert not list(tmp_path.rglob("rollouts.jsonl"))


@pytest.mark.parametrize(
    ("verb", "what"),
    [
        (["compare", "--optimizers=adamw"], "a comparison"),
        (["sweep", "--widths=16", "--episodes=2"], "a sweep with --episodes"),
    ],
)
def test_what_judges_by_rollouts_refuses(
    verb: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*verb, f"--config={CONFIG}", NOWHERE, "--output=out"]) == 2
    assert f"{what} judges by rollouts, and Nowhere names no environment" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_judges_by_the_validation_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["sweep", f"--config={CONFIG}", NOWHERE, "--widths=16", "--learning-rates=0.01", "--seeds=0", "--workers=1"]
    assert main([*sweep, "--parametrizations=mup", "--output=out"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["task"] == "toy"
    assert results["recommended"]["lr"] == 0.01
