"""Many trials on one machine: finished ones are reused, the others share the cores, and progress is shown."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing.managers import SyncManager
from queue import Empty
from typing import Any

from dopr_lightning.configuration import differences
from dopr_lightning.errors import UserError, one_line
from dopr_lightning.experiments.display import Display
from dopr_lightning.experiments.trial import DivergedError, Failure, Outcome, Report, Trial, load_outcome
from dopr_lightning.versions import versions

Engine = Callable[[Sequence[Trial], Display], dict[str, Outcome]]
"""Runs trials and tells the display; returns for each trial's name what came of it."""

KILLED = Failure("a worker process was killed, perhaps for memory (fewer --workers need less)")
"""Of a trial that failed through no fault of its own."""


def run_all(trials: Sequence[Trial], workers: int) -> list[Outcome]:
    """What came of each trial; diverging is a result too.

    Raises:
        UserError: Some trials failed otherwise, or a folder holds a record of other settings.
    """
    outcomes = attempt_all(trials, workers)
    failed = [
        (trial.name, outcome.message)
        for trial, outcome in zip(trials, outcomes, strict=True)
        if isinstance(outcome, Failure) and not outcome.diverged
    ]
    if failed:
        names, more = ", ".join(name for name, _ in failed[:3]), f" and {len(failed) - 3} more" if failed[3:] else ""
        raise UserError(
            f"{names}{more} failed: {failed[0][1]}; see log.txt in their folders, mend it and run the same command "
            "again"
        )
    return outcomes


def attempt_all(trials: Sequence[Trial], workers: int, engine: Engine | None = None) -> list[Outcome]:
    """What came of each trial; of those that failed the log.txt in their folders says more.

    Args:
        trials: Of different names and folders.
        workers: Trials at once.
        engine: Runs those that have not finished; by default worker processes on this machine.

    Raises:
        UserError: A folder holds a record of other settings.
    """
    found = {trial.name: load_outcome(trial) for trial in trials}
    outcomes = {name: outcome for name, outcome in found.items() if outcome is not None}
    missing = [trial for trial in trials if trial.name not in outcomes]
    if missing:
        _warn_of_other_versions(outcomes.values())
        with Display(trials, outcomes, workers) as display:
            outcomes |= (engine or _in_processes)(missing, display)
    return [outcomes[trial.name] for trial in trials]


def _warn_of_other_versions(finished: Iterable[Outcome]) -> None:
    """Trials under one version are comparable; those to come are run with what is installed now."""
    now = versions()
    counts: Counter[str] = Counter()
    for outcome in finished:
        then = {name: version for name, version in outcome.versions.items() if name in now}
        counts[differences(then, {name: now[name] for name in then})] += 1
    del counts[""]
    for changed, count in counts.items():
        print(f"warning: {count} of the finished runs were run with other versions ({changed}); results may differ")


def attempt(trial: Trial, report: Report) -> Outcome:
    """Run a trial. Exceptions stay in the worker: not all of them can be sent."""
    try:
        from dopr_lightning.experiments.run_trial import run_trial  # with Lightning, which takes seconds

        return run_trial(trial, report)
    except Exception as error:
        trial.folder.mkdir(parents=True, exist_ok=True)
        with (trial.folder / "log.txt").open("a") as log:
            traceback.print_exc(file=log)
        said = one_line(error)
        diverged = isinstance(error, DivergedError)
        return Failure(said if diverged else f"{type(error).__name__}: {said}", diverged)


def cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(trials: Sequence[Trial], display: Display) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    context = multiprocessing.get_context("spawn")
    workers = display.left.parallel
    manager = SyncManager(ctx=context)
    manager.start(_end_with_the_command)
    with manager:
        queue: Any = manager.Queue()
        with ProcessPoolExecutor(min(workers, len(trials)), context, initializer=_prepare, initargs=(workers,)) as pool:
            pending = {pool.submit(_attempt, trial, queue): trial for trial in trials}
            while pending:
                _drain(queue, display)
                for future in [future for future in pending if future.done()]:
                    trial = pending.pop(future)
                    outcomes[trial.name] = _outcome(future, trial)
                    display.finished(trial.name, outcomes[trial.name])
    return outcomes


def _prepare(workers: int) -> None:
    """Set a worker up: its share of the cores, and an end."""
    import torch

    _end_with_the_command()
    torch.set_num_threads(max(1, cores() // workers))


def _end_with_the_command() -> None:
    """End this process when the command ends, however it was killed."""

    def follow(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, args=[multiprocessing.parent_process()], daemon=True).start()


def _attempt(trial: Trial, queue: Any) -> Outcome:
    queue.put((trial.name, 0, 1))
    return attempt(trial, lambda *progress: queue.put(progress))


def _drain(queue: Any, display: Display) -> None:
    """Show what the workers report in half a second: quick ones never pause, and what has ended waits to be told."""
    end = time.monotonic() + 0.5
    while (left := end - time.monotonic()) > 0:
        try:
            display.progress(*queue.get(timeout=left))
        except Empty:
            return


def _outcome(future: Future[Outcome], trial: Trial) -> Outcome:
    try:
        return future.result()
    except BrokenExecutor:  # perhaps of another trial's worker, while this one's result was on its way
        return load_outcome(trial) or KILLED
