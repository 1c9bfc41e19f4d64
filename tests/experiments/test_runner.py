"""Many runs in worker processes: what happens to one of them is its own affair."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from toy_task import CONFIG, FIRST_SEED

from dopr_lightning.errors import UserError
from dopr_lightning.experiments import runner
from dopr_lightning.experiments.runner import run_all
from dopr_lightning.experiments.trial import Record, Trial, load_record


def trial(folder: Path, name: str, *overrides: str) -> Trial:
    arguments = (f"--config={CONFIG}", "--trainer.max_steps=4", *overrides)
    return Trial(name, folder / name, arguments, {"overrides": list(overrides)}, 0, FIRST_SEED, 2)


def test_failures_are_named_and_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run fails, and one is killed by the kernel, which takes the pool of workers with it."""
    good = trial(tmp_path, "good")
    diverges = trial(tmp_path, "diverges", "--model.optimizer.base=sgd", "--model.optimizer.lr=1e30")
    killed = trial(tmp_path, "killed", "--data.source=toy_task.Killer")
    later = trial(tmp_path, "later")
    with pytest.raises(UserError, match=r"^diverges, killed, later failed: .*not finite.*; see log.txt"):
        run_all([good, diverges, killed, later], 1)
    record = load_record(good)
    assert record is not None
    out = capsys.readouterr().out
    assert "[1/4] good: val loss" in out
    assert "] diverges: UserError: DoprToy-v0: the policy's action is not finite" in out
    assert "] killed: a worker process was killed" in out
    assert "Traceback" in (tmp_path / "diverges" / "log.txt").read_text()

    # Again, without those two: what is there is reused, what is missing is run.
    stamp = (tmp_path / "good" / "record.json").stat().st_mtime_ns
    records = run_all([good, later], 1)
    assert records[0] == record
    assert records[1].val_loss == record.val_loss
    assert (tmp_path / "good" / "record.json").stat().st_mtime_ns == stamp


def test_no_worker_starts_where_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial(tmp_path, "one")
    one.folder.mkdir()
    record = Record(1.5, [1.0, 2.0], 3.0, one.settings)
    (one.folder / "record.json").write_text(json.dumps(asdict(record)))
    monkeypatch.delattr(runner, "ProcessPoolExecutor")
    assert run_all([one], 2) == [record]
