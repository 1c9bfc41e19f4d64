"""Many trials on one machine: finished ones are reused, the others share the cores, and progress is shown."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from queue import Empty
from typing import Any

from dopr_lightning.errors import UserError
from dopr_lightning.experiments.trial import Record, Trial, load_record, run_trial


def run_all(trials: Sequence[Trial], workers: int) -> list[Record]:
    """Records of all trials, in their order.

    Raises:
        UserError: Some trials failed, or a folder holds a record of other settings.
    """
    outcomes = attempt_all(trials, workers)
    failed = [
        (trial.name, outcome) for trial, outcome in zip(trials, outcomes, strict=True) if isinstance(outcome, str)
    ]
    if failed:
        names, more = ", ".join(name for name, _ in failed[:3]), f" and {len(failed) - 3} more" if failed[3:] else ""
        raise UserError(
            f"{names}{more} failed: {failed[0][1]}; see log.txt in their folders, mend it and run the same command "
            "again"
        )
    return [outcome for outcome in outcomes if isinstance(outcome, Record)]


def attempt_all(trials: Sequence[Trial], workers: int) -> list[Record | str]:
    """For each trial its record or, in a line, why it failed; the log.txt in its folder says more.

    Raises:
        UserError: A folder holds a record of other settings.
    """
    outcomes: dict[str, Record | str | None] = {trial.name: load_record(trial) for trial in trials}
    missing = [trial for trial in trials if outcomes[trial.name] is None]
    if missing:
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, _Display(trials, missing) as display:
            queue: Any = manager.Queue()
            with ProcessPoolExecutor(
                min(workers, len(missing)), context, initializer=_prepare, initargs=(workers,)
            ) as pool:
                futures = {pool.submit(_attempt, trial, queue): trial for trial in missing}
                pending = set(futures)
                while pending:
                    display.drain(queue)
                    done = [future for future in futures if future in pending and future.done()]
                    for future in done:
                        name, result = futures[future].name, _outcome(future)
                        outcomes[name] = result
                        display.finished(name, result)
                    pending.difference_update(done)
    return [outcome for trial in trials if (outcome := outcomes[trial.name]) is not None]


def cores() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(workers: int) -> None:
    """Set a worker up: its share of the cores, and an end when the command ends, however it was killed."""
    import torch

    def follow(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, args=[multiprocessing.parent_process()], daemon=True).start()
    torch.set_num_threads(max(1, cores() // workers))


def _attempt(trial: Trial, queue: Any) -> Record | str:
    """The record, or why there is none. Exceptions stay in the worker: not all of them can be sent."""
    try:
        return run_trial(trial, lambda *progress: queue.put(progress))
    except Exception as error:
        trial.folder.mkdir(parents=True, exist_ok=True)
        with (trial.folder / "log.txt").open("a") as log:
            traceback.print_exc(file=log)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _outcome(future: Future[Record | str]) -> Record | str:
    try:
        return future.result()
    except BrokenExecutor:
        return "a worker process was killed, perhaps for memory (fewer --workers need less)"


class _Display:
    """A bar for all trials and one for each under way; plain lines where there is no terminal."""

    def __init__(self, trials: Sequence[Trial], missing: Sequence[Trial]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._terminal = sys.stdout.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            transient=True,
            disable=not self._terminal,
        )
        self._all = self._progress.add_task("runs", total=len(trials), completed=len(trials) - len(missing))
        self._bars: dict[str, Any] = {}
        self._done, self._total = len(trials) - len(missing), len(trials)
        if self._done:
            self._progress.console.print(f"{self._done} of {self._total} runs were finished before; they are reused")

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def drain(self, queue: Any) -> None:
        """Show what the workers report; waits up to half a second for it."""
        try:
            while True:
                name, step, steps = queue.get(timeout=0.5)
                bar = self._bars.get(name)
                if bar is None:
                    bar = self._bars[name] = self._progress.add_task(name, total=steps)
                self._progress.update(bar, completed=step)
        except Empty:
            return

    def finished(self, name: str, outcome: Record | str) -> None:
        """Replace a trial's bar by a line."""
        self._done += 1
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        self._progress.update(self._all, completed=self._done)
        if isinstance(outcome, Record):
            said = f"val loss {outcome.val_loss:.4g}, closed loop {outcome.mean:.4g}, {outcome.train_seconds:.0f} s"
        else:
            said = outcome
        print_line = self._progress.console.print if self._terminal else print
        print_line(f"[{self._done}/{self._total}] {name}: {said}".replace("[", "\\[" if self._terminal else "["))
        sys.stdout.flush()
