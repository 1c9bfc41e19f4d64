"""Many runs in worker processes: what happens to one of them is its own affair."""

from __future__ import annotations

import json
from concurrent.futures import BrokenExecutor, Future
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_task import CONFIG, FIRST_SEED

from dopr_lightning.errors import UserError
from dopr_lightning.experiments import runner
from dopr_lightning.experiments.display import TimeLeft, duration
from dopr_lightning.experiments.runner import KILLED, run_all
from dopr_lightning.experiments.trial import Failure, Outcome, Record, Trial, load_outcome


def trial(folder: Path, name: str, *overrides: str) -> Trial:
    arguments = (f"--config={CONFIG}", "--trainer.max_steps=4", *overrides)
    return Trial(name, folder / name, arguments, {"overrides": list(overrides)}, 0, FIRST_SEED, 2)


def test_failures_are_named_and_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run fails, and one is killed by the kernel, which takes the pool of workers with it."""
    good = trial(tmp_path, "good")
    diverges = trial(tmp_path, "diverges", "--model.optimizer.base=sgd", "--model.optimizer.lr=1e30")
    killed = trial(tmp_path, "killed", "--data.source=toy_task.Killer")
    later = trial(tmp_path, "later")
    with pytest.raises(UserError, match=r"^killed, later failed: a worker process was killed.*; see log.txt"):
        run_all([good, diverges, killed, later], 1)
    record = load_outcome(good)
    assert record is not None
    out = capsys.readouterr().out
    assert "[1/4] good: val loss" in out
    assert "] diverges: diverged: the training loss is not finite, by step" in out
    assert "] killed: a worker process was killed" in out
    assert "Traceback" in (tmp_path / "diverges" / "log.txt").read_text()

    # Diverging is what came of it: no run is needed to say so again.
    monkeypatch.setattr(runner, "ProcessPoolExecutor", None)
    found, how = run_all([good, diverges], 1)
    assert found == record
    assert isinstance(how, Failure)
    assert how.message.startswith("diverged: the training loss is not finite")
    monkeypatch.undo()

    # Again, without those two: what is there is reused, what is missing is run.
    stamp = (tmp_path / "good" / "record.json").stat().st_mtime_ns
    found, other = run_all([good, later], 1)
    assert found == record
    assert isinstance(other, Record)
    assert isinstance(record, Record)
    assert other.val_loss == record.val_loss
    assert (tmp_path / "good" / "record.json").stat().st_mtime_ns == stamp


def test_what_was_run_with_other_versions_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        runner, "_in_processes", lambda trials, display: {one.name: runner.attempt(one, print) for one in trials}
    )
    good = trial(tmp_path, "good")
    diverges = trial(tmp_path, "diverges", "--model.optimizer.base=sgd", "--model.optimizer.lr=1e30")
    older, later, last = (trial(tmp_path, name) for name in ("older", "later", "last"))
    run_all([good, diverges, older], 1)
    files = [tmp_path / "good" / "record.json", tmp_path / "diverges" / "diverged.json"]
    for file in files:
        noted = json.loads(file.read_text())
        assert noted["versions"].items() >= {name: version(name) for name in ("dopr-lightning", "torch")}.items()
    before = tmp_path / "older" / "record.json"
    record = json.loads(before.read_text())
    del record["versions"]  # as of a run from before they were noted
    before.write_text(json.dumps(record))

    capsys.readouterr()
    run_all([good, diverges, older, later], 1)
    assert "warning" not in capsys.readouterr().out
    for file in files:
        noted = json.loads(file.read_text())
        file.write_text(json.dumps(noted | {"versions": noted["versions"] | {"torch": "1.0"}}))
    run_all([good, diverges, older, later], 1)
    assert "warning" not in capsys.readouterr().out  # nothing is run that would differ
    run_all([good, diverges, older, later, last], 1)
    out = capsys.readouterr().out
    assert f"warning: 2 of the finished runs were run with other versions (torch: 1.0 -> {version('torch')})" in out


def test_no_worker_starts_where_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial(tmp_path, "one")
    one.folder.mkdir()
    record = Record(1.5, [1.0, 2.0], 3.0, one.settings)
    (one.folder / "record.json").write_text(json.dumps(asdict(record)))
    monkeypatch.delattr(runner, "ProcessPoolExecutor")
    assert run_all([one], 2) == [record]


def test_a_trial_that_was_over_when_another_was_killed_keeps_its_record(tmp_path: Path) -> None:
    one = trial(tmp_path, "one")
    one.folder.mkdir()
    broken: Future[Outcome] = Future()
    broken.set_exception(BrokenExecutor())
    assert runner._outcome(broken, one) == KILLED
    record = Record(1.5, [1.0, 2.0], 3.0, one.settings)
    (one.folder / "record.json").write_text(json.dumps(asdict(record)))
    assert runner._outcome(broken, one) == record


def test_two_widths_that_are_over_tell_how_the_time_grows() -> None:
    """Four times the cost took twice as long: so will the next four times, not four times as long."""
    left = TimeLeft([replace(trial(Path(), "wide"), cost=16.0)], 1, lambda: 0.0)
    left.learn(4.0, 2.0)
    assert left.seconds() == 8.0  # in proportion, as long as one width is known
    left.learn(1.0, 1.0)
    assert left.seconds() == pytest.approx(4.0)
    left.learn(1.0, 3.0)
    left.learn(1.0, 3.0)  # narrow ones were slower: no wide one is expected to be faster than the nearest
    assert left.seconds() == pytest.approx(2.0)


def test_the_time_left_follows_from_what_is_over() -> None:
    """Two at once; wide ones cost ten times as much as narrow ones."""
    now = [0.0]
    narrow = [replace(trial(Path(), f"narrow {i}"), cost=1.0) for i in range(4)]
    wide = [replace(trial(Path(), f"wide {i}"), cost=10.0) for i in range(2)]
    left = TimeLeft([*narrow, *wide], 2, lambda: now[0])
    left.progress("narrow 0", 0)
    assert left.seconds() is None
    now[0] = 1.0
    left.progress("narrow 0", 0.5)
    left.progress("narrow 1", 0)
    assert left.seconds() is None  # of one under way its own end is known, of the others nothing
    now[0] = 2.0
    left.finished("narrow 0", useful=True)  # 2 s: so 2 for each narrow one, of which 1 has passed; 20 for each wide one
    assert left.seconds() == (1 + 2 + 2 + 20 + 20) / 2
    left.progress("narrow 1", 0.1)  # a tenth in 1 s: 9 more
    assert left.seconds() == pytest.approx((9 + 2 + 2 + 20 + 20) / 2)
    left.finished("narrow 1", useful=False)  # it failed, and says nothing of others
    for name in ("narrow 2", "narrow 3"):
        left.progress(name, 0)
    now[0] = 5.0  # longer than expected: done at any moment
    assert left.seconds() == (0 + 0 + 20 + 20) / 2
    for name in ("narrow 2", "narrow 3"):
        left.finished(name, useful=True)
    assert left.seconds() == 30 + 30 - 30  # a median of 3 s now: 30 for each of two at once
    left.learn(10.0, 8.0)  # a wide one that was finished before
    left.finished("wide 0", useful=False)
    assert left.seconds() == 8.0
    left.finished("wide 1", useful=True)
    assert left.seconds() == 0


def test_durations_are_said_as_people_do() -> None:
    assert [duration(s) for s in (0.4, 89, 90, 720, 5399, 12_000)] == [
        "0 s", "89 s", "2 min", "12 min", "1 h 30 min", "3 h 20 min",
    ]  # fmt: skip


def test_workers_that_never_pause_do_not_keep_what_has_ended_from_being_told() -> None:
    class Busy:
        def get(self, timeout: float) -> tuple[str, int, int]:
            return ("one", 1, 2)

    shown: list[tuple[Any, ...]] = []
    display = SimpleNamespace(progress=lambda *said: shown.append(said))
    runner._drain(Busy(), display)  # type: ignore[arg-type]  # returns at all
    assert set(shown) == {("one", 1, 2)}
