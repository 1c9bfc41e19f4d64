"""Where environments are stepped: in this process, or in others, whose death costs an episode and not the run.

Both answer a round of orders, at most one per environment, with what happened in each. A round ends when all have
answered: the policy's calls are then batched as they would be in one process, and so are the results.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.seat import Description, Seat, SimulationError, Stretch, where

Array = npt.NDArray[np.float32]

# A new process must import the simulator first, from a network disk perhaps.
STARTUP_S = 300.0
# Afterwards a process that should have ended by itself is killed, and one that is killed is waited for no longer.
ENDING_S = 10.0


@dataclass(frozen=True)
class Lost:
    """An episode that cannot go on.

    Args:
        reason: One line.
        own: Its environment failed; else another one that shares its process did.
    """

    reason: str
    own: bool


class Seats(Protocol):
    """Environments, numbered from 0."""

    def describe(self) -> Description:
        """What they give and take."""

    def start(self, seeds: Mapping[int, int]) -> Mapping[int, Stretch | Lost]:
        """Begin an episode from a seed, per environment."""

    def execute(self, chunks: Mapping[int, Array]) -> Mapping[int, Stretch | Lost]:
        """Go on with actions (act, A), per environment."""


@contextmanager
def seats(
    spec: EnvironmentSpec, count: int, observe: int, *, workers: int = 0, timeout_s: float = 60.0, film: bool = False
) -> Iterator[Seats]:
    """Environments, closed in the end.

    Args:
        spec: Of the environment.
        count: How many.
        observe: Observations the policy sees at once.
        workers: Processes to hold them; 0 for this one.
        timeout_s: Longest time for an order; a worker that takes longer is killed. An environment in this process is
            waited for.
        film: Render what happens.
    """
    made = _Elsewhere(spec, count, observe, film, workers, timeout_s) if workers else _Here(spec, count, observe, film)
    try:
        yield made
    finally:
        made.close()


class _Here:
    """Environments in this process; whatever fails is raised."""

    def __init__(self, spec: EnvironmentSpec, count: int, observe: int, film: bool) -> None:
        self._seats = [Seat(spec, observe, film) for _ in range(count)]

    def describe(self) -> Description:
        return self._seats[0].describe()

    def start(self, seeds: Mapping[int, int]) -> Mapping[int, Stretch]:
        return {seat: self._seats[seat].start(seed) for seat, seed in seeds.items()}

    def execute(self, chunks: Mapping[int, Array]) -> Mapping[int, Stretch]:
        return {seat: self._seats[seat].execute(chunk) for seat, chunk in chunks.items()}

    def close(self) -> None:
        for seat in self._seats:
            seat.close()


@dataclass(frozen=True)
class _Order:
    seat: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass
class _Worker:
    """A process, seen from outside."""

    process: Any
    connection: Connection
    started: bool = False
    waiting: deque[_Order] = field(default_factory=deque)
    current: _Order | None = None  # one at a time, so that it is known which one a process died of
    deadline: float = 0.0

    def end(self, within: float = 0.0) -> None:
        """Wait for it to end by itself, then kill it."""
        self.connection.close()
        self.process.join(within)
        self.process.kill()
        self.process.join(ENDING_S)


class _Elsewhere:
    """Environments in other processes: environment i in process i modulo their number.

    A process that dies or hangs is replaced, and the episodes under way in it are lost.
    """

    def __init__(
        self, spec: EnvironmentSpec, count: int, observe: int, film: bool, workers: int, timeout_s: float
    ) -> None:
        # Not forked: threads, CUDA and OpenGL do not survive that.
        self._context = multiprocessing.get_context("spawn")
        self._spec = spec
        self._arguments = (spec, observe, film)
        self._timeout_s = timeout_s
        self._under_way: dict[int, tuple[int, int]] = {}  # seat: seed and steps of its episode
        self._workers = [self._hired() for _ in range(min(workers, count))]

    def describe(self) -> Description:
        answer = self._round([_Order(0, "describe")])[0]
        if isinstance(answer, Lost):
            raise SimulationError(answer.reason)
        return answer

    def start(self, seeds: Mapping[int, int]) -> Mapping[int, Stretch | Lost]:
        self._under_way |= {seat: (seed, 0) for seat, seed in seeds.items()}
        return self._round([_Order(seat, "start", (seed,)) for seat, seed in seeds.items()])

    def execute(self, chunks: Mapping[int, Array]) -> Mapping[int, Stretch | Lost]:
        return self._round([_Order(seat, "execute", (chunk,)) for seat, chunk in chunks.items()])

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()  # ends those that have nothing to do
        patience = time.monotonic() + ENDING_S
        for worker in self._workers:
            worker.end(within=0.0 if worker.current else max(0.0, patience - time.monotonic()))

    def _round(self, orders: Sequence[_Order]) -> dict[int, Any]:
        """Answers in the order of the orders, followed by episodes lost beside them."""
        answers: dict[int, Any] = dict.fromkeys(order.seat for order in orders)
        for order in orders:
            self._workers[order.seat % len(self._workers)].waiting.append(order)
        for number in range(len(self._workers)):
            self._give(number, answers)
        while busy := [number for number, worker in enumerate(self._workers) if worker.current]:
            patience = min(self._workers[number].deadline for number in busy) - time.monotonic()
            ready = wait([self._workers[number].connection for number in busy], max(0.0, patience))
            for number in busy:
                worker = self._workers[number]
                if worker.connection in ready:
                    self._take(number, answers)
                elif time.monotonic() > worker.deadline:
                    self._replace(number, answers, overdue=True)
        return answers

    def _give(self, number: int, answers: dict[int, Any]) -> None:
        """Send the next order, if any."""
        worker = self._workers[number]
        worker.current = worker.waiting.popleft() if worker.waiting else None
        if worker.current is None:
            return
        worker.deadline = time.monotonic() + self._allowed_s(worker)
        try:
            worker.connection.send((worker.current.seat, worker.current.method, worker.current.arguments))
        except OSError:
            self._replace(number, answers)

    def _take(self, number: int, answers: dict[int, Any]) -> None:
        """Receive the answer to the present order, and send the next one."""
        worker = self._workers[number]
        assert worker.current is not None
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(number, answers)
            return
        worker.started = True
        seat = worker.current.seat
        if isinstance(answer, SimulationError):
            self._under_way.pop(seat, None)
            answer = Lost(str(answer), own=True)
        elif isinstance(answer, UserError):
            raise answer
        elif isinstance(answer, Stretch):
            seed, steps = self._under_way.pop(seat)
            if not answer.done:
                self._under_way[seat] = (seed, steps + len(answer.rewards))
        answers[seat] = answer
        self._give(number, answers)

    def _replace(self, number: int, answers: dict[int, Any], overdue: bool = False) -> None:
        """Put a new process in the place of one that died or hangs."""
        worker, culprit = self._workers[number], self._workers[number].current
        assert culprit is not None
        worker.end(within=0.0 if overdue else ENDING_S)
        reason = _death(worker)
        if overdue:
            reason = f"no answer for {self._allowed_s(worker):g} s; if it is only slow, raise timeout_s"
        if culprit.method == "describe":
            answers[culprit.seat] = Lost(f"{self._spec.id} cannot be made: {reason}", own=True)
        for seat, (seed, steps) in list(self._under_way.items()):
            not_begun = any(order.seat == seat and order.method == "start" for order in worker.waiting)
            if seat % len(self._workers) == number and not not_begun:
                where_ = f"{where(self._spec, seed, steps)} or later"
                beside = "" if seat == culprit.seat else " (in another episode of the same process)"
                answers[seat] = Lost(f"{where_}: {reason}{beside}", own=seat == culprit.seat)
                del self._under_way[seat]
        self._workers[number] = self._hired()
        self._workers[number].waiting += [order for order in worker.waiting if order.method == "start"]
        self._give(number, answers)

    def _allowed_s(self, worker: _Worker) -> float:
        return self._timeout_s + (0.0 if worker.started else STARTUP_S)

    def _hired(self) -> _Worker:
        ours, its = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(its, *self._arguments), daemon=True)
        process.start()
        its.close()  # or the process's death would not end what can be read from ours
        return _Worker(process, ours)


def _death(worker: _Worker) -> str:
    code = worker.process.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    memory = "; if memory ran out, use fewer environments" if how == "SIGKILL" else ""
    when = "" if worker.started else " while starting, see its message above"
    return f"its process died{when} ({how}{memory})"


def _serve(connection: Connection, spec: EnvironmentSpec, observe: int, film: bool) -> None:
    """What a worker process does: answer orders until nobody gives any."""
    # The terminal and SLURM send these to all processes; they are for the one that trains.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    mine: dict[int, Seat] = {}
    with suppress(EOFError, OSError):
        while True:
            number, method, arguments = connection.recv()
            seat = mine.setdefault(number, Seat(spec, observe, film))
            try:
                answer = getattr(seat, method)(*arguments)
            except UserError as error:
                answer = error
                seat.close()  # it is broken
            connection.send(answer)
    for seat in mine.values():
        seat.close()
