"""Where environments are stepped: in this process, or in others, whose death costs an episode and not the run.

Both answer a round of requests, at most one per environment, with what happened in each. A round ends when all have
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
from dopr_lightning.rollout.slot import Description, EnvSlot, Segment, SimulationError, where

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


class EnvPool(Protocol):
    """Environments, numbered from 0."""

    def describe(self) -> Description:
        """What they give and take."""

    def start(self, seeds: Mapping[int, int]) -> Mapping[int, Segment | Lost]:
        """Begin an episode from a seed, per environment."""

    def execute(self, chunks: Mapping[int, Array]) -> Mapping[int, Segment | Lost]:
        """Go on with actions (act, A), per environment."""


@contextmanager
def env_pool(
    spec: EnvironmentSpec, count: int, observe: int, *, workers: int = 0, timeout_s: float = 60.0, film: bool = False
) -> Iterator[EnvPool]:
    """Environments, closed in the end.

    Args:
        spec: Of the environment.
        count: How many.
        observe: Observations the policy sees at once.
        workers: Processes to hold them; 0 for this one.
        timeout_s: Longest time for a request; a worker that takes longer is killed. An environment in this process is
            waited for.
        film: Render what happens.
    """
    made = (
        _WorkerPool(spec, count, observe, film, workers, timeout_s)
        if workers
        else _LocalPool(spec, count, observe, film)
    )
    try:
        yield made
    finally:
        made.close()


class _LocalPool:
    """Environments in this process; whatever fails is raised."""

    def __init__(self, spec: EnvironmentSpec, count: int, observe: int, film: bool) -> None:
        self._slots = [EnvSlot(spec, observe, film) for _ in range(count)]

    def describe(self) -> Description:
        return self._slots[0].describe()

    def start(self, seeds: Mapping[int, int]) -> Mapping[int, Segment]:
        return {slot: self._slots[slot].start(seed) for slot, seed in seeds.items()}

    def execute(self, chunks: Mapping[int, Array]) -> Mapping[int, Segment]:
        return {slot: self._slots[slot].execute(chunk) for slot, chunk in chunks.items()}

    def close(self) -> None:
        for slot in self._slots:
            slot.close()


@dataclass(frozen=True)
class _Request:
    slot: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass
class _Worker:
    """A process, seen from outside."""

    process: Any
    connection: Connection
    started: bool = False
    waiting: deque[_Request] = field(default_factory=deque)
    current: _Request | None = None  # one at a time, so that it is known which one a process died of
    deadline: float = 0.0

    def end(self, within: float = 0.0) -> None:
        """Wait for it to end by itself, then kill it."""
        self.connection.close()
        self.process.join(within)
        self.process.kill()
        self.process.join(ENDING_S)


class _WorkerPool:
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
        self._under_way: dict[int, tuple[int, int]] = {}  # slot: seed and steps of its episode
        self._workers = [self._new_worker() for _ in range(min(workers, count))]

    def describe(self) -> Description:
        answer = self._round([_Request(0, "describe")])[0]
        if isinstance(answer, Lost):
            raise SimulationError(answer.reason)
        return answer

    def start(self, seeds: Mapping[int, int]) -> Mapping[int, Segment | Lost]:
        self._under_way |= {slot: (seed, 0) for slot, seed in seeds.items()}
        return self._round([_Request(slot, "start", (seed,)) for slot, seed in seeds.items()])

    def execute(self, chunks: Mapping[int, Array]) -> Mapping[int, Segment | Lost]:
        return self._round([_Request(slot, "execute", (chunk,)) for slot, chunk in chunks.items()])

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()  # ends those that have nothing to do
        patience = time.monotonic() + ENDING_S
        for worker in self._workers:
            worker.end(within=0.0 if worker.current else max(0.0, patience - time.monotonic()))

    def _round(self, requests: Sequence[_Request]) -> dict[int, Any]:
        """Answers in the order of the requests, followed by episodes lost beside them."""
        answers: dict[int, Any] = dict.fromkeys(request.slot for request in requests)
        for request in requests:
            self._workers[request.slot % len(self._workers)].waiting.append(request)
        for number in range(len(self._workers)):
            self._send_next(number, answers)
        while busy := [number for number, worker in enumerate(self._workers) if worker.current]:
            patience = min(self._workers[number].deadline for number in busy) - time.monotonic()
            ready = wait([self._workers[number].connection for number in busy], max(0.0, patience))
            for number in busy:
                worker = self._workers[number]
                if worker.connection in ready:
                    self._receive(number, answers)
                elif time.monotonic() > worker.deadline:
                    self._replace(number, answers, overdue=True)
        return answers

    def _send_next(self, number: int, answers: dict[int, Any]) -> None:
        """Send the next request, if any."""
        worker = self._workers[number]
        worker.current = worker.waiting.popleft() if worker.waiting else None
        if worker.current is None:
            return
        worker.deadline = time.monotonic() + self._allowed_s(worker)
        try:
            worker.connection.send((worker.current.slot, worker.current.method, worker.current.arguments))
        except OSError:
            self._replace(number, answers)

    def _receive(self, number: int, answers: dict[int, Any]) -> None:
        """Receive the answer to the present request, and send the next one."""
        worker = self._workers[number]
        assert worker.current is not None
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(number, answers)
            return
        worker.started = True
        slot = worker.current.slot
        if isinstance(answer, SimulationError):
            self._under_way.pop(slot, None)
            answer = Lost(str(answer), own=True)
        elif isinstance(answer, UserError):
            raise answer
        elif isinstance(answer, Segment):
            seed, steps = self._under_way.pop(slot)
            if not answer.done:
                self._under_way[slot] = (seed, steps + len(answer.rewards))
        answers[slot] = answer
        self._send_next(number, answers)

    def _replace(self, number: int, answers: dict[int, Any], overdue: bool = False) -> None:
        """Put a new process in the place of one that died or hangs."""
        worker, culprit = self._workers[number], self._workers[number].current
        assert culprit is not None
        worker.end(within=0.0 if overdue else ENDING_S)
        reason = _death(worker)
        if overdue:
            reason = f"no answer for {self._allowed_s(worker):g} s; if it is only slow, raise timeout_s"
        if culprit.method == "describe":
            answers[culprit.slot] = Lost(f"{self._spec.id} cannot be made: {reason}", own=True)
        for slot, (seed, steps) in list(self._under_way.items()):
            not_begun = any(request.slot == slot and request.method == "start" for request in worker.waiting)
            if slot % len(self._workers) == number and not not_begun:
                where_ = f"{where(self._spec, seed, steps)} or later"
                beside = "" if slot == culprit.slot else " (in another episode of the same process)"
                answers[slot] = Lost(f"{where_}: {reason}{beside}", own=slot == culprit.slot)
                del self._under_way[slot]
        self._workers[number] = self._new_worker()
        self._workers[number].waiting += [request for request in worker.waiting if request.method == "start"]
        self._send_next(number, answers)

    def _allowed_s(self, worker: _Worker) -> float:
        return self._timeout_s + (0.0 if worker.started else STARTUP_S)

    def _new_worker(self) -> _Worker:
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
    """What a worker process does: answer requests until nobody gives any."""
    # The terminal and SLURM send these to all processes; they are for the one that trains.
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    mine: dict[int, EnvSlot] = {}
    with suppress(EOFError, OSError):
        while True:
            number, method, arguments = connection.recv()
            slot = mine.setdefault(number, EnvSlot(spec, observe, film))
            try:
                answer = getattr(slot, method)(*arguments)
            except UserError as error:
                answer = error
                slot.close()  # it is broken
            connection.send(answer)
    for slot in mine.values():
        slot.close()
