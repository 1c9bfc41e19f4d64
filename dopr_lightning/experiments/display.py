"""What a person sees while trials run: bars in a terminal, lines elsewhere, and how long it will take."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dopr_lightning.experiments.trial import Outcome, Record, Trial
from dopr_lightning.words import duration


class TimeLeft:
    """Estimates the seconds left, from the trials that are over and how far the others have come.

    A trial of a cost that has been seen takes as long as those did; one of another cost, as long as those of the
    nearest, in proportion, or by the power of the cost between the two nearest where two have been seen.

    Args:
        trials: All that are to run.
        parallel: How many run at once.
        clock: Gives seconds.
    """

    def __init__(self, trials: Sequence[Trial], parallel: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.parallel = parallel
        self._clock = clock
        self._costs = {trial.name: trial.cost for trial in trials}
        self._started: dict[str, tuple[float, float]] = {}  # since when, and the fraction done
        self._seconds: dict[float, list[float]] = {}  # by cost

    def learn(self, cost: float, seconds: float) -> None:
        """A trial of that cost took so long."""
        self._seconds.setdefault(cost, []).append(seconds)

    def progress(self, name: str, fraction: float) -> None:
        """A trial runs, and has come so far; the first call says that it starts."""
        since = self._started[name][0] if name in self._started else self._clock()
        self._started[name] = (since, fraction)

    def finished(self, name: str, useful: bool) -> None:
        """A trial is over; one that failed says nothing of how long others take."""
        cost, started = self._costs.pop(name), self._started.pop(name, None)
        if useful and started:
            self.learn(cost, self._clock() - started[0])

    def seconds(self) -> float | None:
        """Of all trials that are not over; None as long as there is nothing to go by."""
        total = 0.0
        for name, cost in self._costs.items():
            since, fraction = self._started.get(name, (self._clock(), 0.0))
            elapsed = self._clock() - since
            expected = elapsed / fraction if fraction > 0 else self._expected(cost)
            if expected is None:
                return None
            total += max(0.0, expected - elapsed)
        return total / min(self.parallel, max(1, len(self._costs)))

    def _expected(self, cost: float) -> float | None:
        if not self._seconds:
            return None
        nearest, *others = sorted(self._seconds, key=lambda known: abs(math.log(known / cost)))
        # The median: the first trials of a process also wait for its imports.
        seconds = statistics.median(self._seconds[nearest])
        power = 1.0
        if others and cost != nearest and seconds > 0:
            # Small networks spend most of their time on what no width changes: proportion alone expects far too much.
            second = statistics.median(self._seconds[others[0]])
            power = math.log(max(second, 1e-9) / seconds) / math.log(others[0] / nearest)
        return seconds * (cost / nearest) ** min(1.0, max(0.0, power))


class Display:
    """A bar for all trials and one for each under way; plain lines where there is no terminal.

    Args:
        trials: All of them.
        before: What came of those that are not to run.
        parallel: How many run at once.
    """

    def __init__(self, trials: Sequence[Trial], before: dict[str, Outcome], parallel: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._terminal = sys.stdout.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            transient=True,
            disable=not self._terminal,
        )
        self._done, self._total = len(before), len(trials)
        self._all = self._progress.add_task("runs", total=self._total, completed=self._done)
        self._bars: dict[str, Any] = {}
        self.left = TimeLeft([trial for trial in trials if trial.name not in before], parallel)
        for trial in trials:
            outcome = before.get(trial.name)
            if isinstance(outcome, Record):
                self.left.learn(trial.cost, outcome.train_seconds)
        if self._done:
            self._progress.console.print(f"{self._done} of {self._total} runs were finished before; they are reused")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def progress(self, name: str, step: int, steps: int) -> None:
        """A trial has come so far; at its start, to step 0."""
        self.left.progress(name, step / steps)
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=steps)
        self._progress.update(self._bars[name], completed=step, total=steps)
        self._progress.update(self._all, description=", ".join(["runs", *self._time_left()]))

    def finished(self, name: str, outcome: Outcome) -> None:
        """Replace a trial's bar by a line."""
        self._done += 1
        self.left.finished(name, isinstance(outcome, Record))
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        self._progress.update(self._all, completed=self._done)
        if isinstance(outcome, Record):
            said = [f"val loss {outcome.val_loss:.4g}"]
            said += [f"rollouts {outcome.mean:.4g}"] if outcome.episodes else []
            said += [f"{outcome.train_seconds:.0f} s"]
        else:
            said = [outcome.message]
        line = f"[{self._done}/{self._total}] {name}: {', '.join([*said, *self._time_left()])}"
        print_line = self._progress.console.print if self._terminal else print
        print_line(line.replace("[", "\\[" if self._terminal else "["))
        sys.stdout.flush()

    def _time_left(self) -> list[str]:
        seconds = self.left.seconds() if self._done < self._total else None
        return [] if seconds is None else [f"about {duration(seconds)} left"]
