"""Environments in other processes: the same episodes as in this one, also when processes fail."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_environment import SPEC, Faulty
from torch import Tensor

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.evaluate import Episode, evaluate

SEEDS = [6, 1, 2, 9, 4, 3, 8]
CAMERAS = ("front", "wrist")


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


class Network:
    """A random network whose batched products round differently in other batches; with noise."""

    observe, act, observation_dim, action_dim = 2, 2, 2, 1

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.normal_(generator=generator)

    def predict(self, observations: Any, generators: Sequence[torch.Generator]) -> Tensor:
        noise = torch.stack([torch.randn(2, 1, generator=g) for g in generators])
        state = observations if isinstance(observations, Tensor) else observations["state"]
        actions = self.network(state.flatten(1) / 10).reshape(-1, 2, 1) / 10 + noise / 10
        if isinstance(observations, Tensor):
            return actions
        return actions + sum(
            image.float().mean((1, 2, 3, 4))[:, None, None] for image in observations["images"].values()
        )


def same(one: Sequence[Episode], other: Sequence[Episode]) -> bool:
    """Bit for bit, restarts aside."""
    return all(
        replace(a, restarts=0) == replace(b, restarts=0) and np.array_equal(a.actions, b.actions)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("cameras", [(), CAMERAS])
def test_the_same_episodes_as_in_this_process(cameras: tuple[str, ...]) -> None:
    spec = replace(SPEC, cameras=cameras, kwargs={"cameras": cameras})
    here = evaluate(Network(), spec, SEEDS, num_envs=3)
    assert len({episode.return_ for episode in here}) == len(SEEDS)
    told: list[Episode] = []
    elsewhere = evaluate(Network(), spec, SEEDS, num_envs=3, workers=2, progress=told.append)
    assert same(here, elsewhere)
    assert {episode.restarts for episode in elsewhere} == {0}
    assert sorted(episode.seed for episode in told) == sorted(SEEDS)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_that_cannot_be_closed_costs_no_episodes(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    already = Faulty.closed
    episodes = evaluate(Network(), replace(SPEC, kwargs={"fault": "close"}), SEEDS, num_envs=3, workers=workers)
    assert same(episodes, evaluate(Network(), SPEC, SEEDS, num_envs=3))
    if not workers:
        assert Faulty.closed == already + 6
        assert caplog.messages == ["DoprFaulty-v0 cannot be closed: RuntimeError: the display is gone"] * 3


def failing(folder: Path, fault: str, seeds: Sequence[int] = (9,), times: int = 1) -> EnvironmentSpec:
    return replace(SPEC, kwargs={"fault": fault, "seeds": seeds, "times": times, "folder": str(folder)})


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise", "step 3: RuntimeError: the simulator fell over"),
        ("die", r"step 2 or later: its process died \(SIGKILL; if memory ran out, use fewer environments\)"),
        ("exit", r"step 2 or later: its process died \(exit status 3\)"),
        ("hang", "step 2 or later: no answer for 6 s; if it is only slow, raise timeout_s"),
    ],
)
def test_a_failed_episode_is_begun_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str, said: str
) -> None:
    calm = evaluate(Separate(), SPEC, SEEDS, num_envs=3)
    with caplog.at_level(logging.WARNING):
        episodes = evaluate(Separate(), failing(tmp_path, fault), SEEDS, num_envs=3, workers=2, timeout_s=6)
    assert same(calm, episodes)
    restarts = {episode.seed: episode.restarts for episode in episodes}
    assert restarts.pop(9) == 1
    messages = [record.getMessage() for record in caplog.records]
    assert re.search(f"seed 9, {said}", messages[0])
    others = [seed for seed, count in restarts.items() if count]
    assert len(messages) == 1 + len(others)
    assert len(others) <= (fault != "raise")  # three environments in two processes: one or none shares it
    assert sum(restarts.values()) == len(others)
    for seed, message in zip(others, messages[1:], strict=True):
        assert re.search(rf"seed {seed}, step \d or later: .*\(in another episode of the same process\)", message)


class Separate(Network):
    """One row at a time, as other episodes run beside one that is begun again."""

    def predict(self, observations: Any, generators: Sequence[torch.Generator]) -> Tensor:
        rows = [super(Separate, self).predict(o[None], [g]) for o, g in zip(observations, generators, strict=True)]
        return torch.cat(rows)


def test_processes_start_without_what_takes_seconds() -> None:
    """Ten of them would import torch ten times, for nothing."""
    command = (
        "import sys, dopr_lightning.rollout.workers; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout == "[]\n"


def test_what_others_do_does_not_count_against_an_episode(tmp_path: Path) -> None:
    """Of three episodes in one process, two kill it, one after the other; the third fails not even once."""
    calm = evaluate(Separate(), SPEC, [9, 12, 8], num_envs=3)
    episodes = evaluate(Separate(), failing(tmp_path, "die", seeds=(9, 12)), [9, 12, 8], num_envs=3, workers=1)
    assert same(calm, episodes)
    assert [episode.restarts for episode in episodes] == [2, 2, 2]


def test_episodes_that_have_not_begun_are_not_lost(tmp_path: Path) -> None:
    """Three in one process, each in turn kills it when reset."""
    seeds = [1, 2, 9]
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        episodes = evaluate(Separate(), failing(folder, "reset", seeds=(seed,)), seeds, num_envs=3, workers=1)
        assert same(episodes, evaluate(Separate(), SPEC, seeds))
        # Those reset before it are begun again as well, those after it only now.
        assert [e.restarts for e in episodes] == [int(s <= seed) for s in seeds]


@pytest.mark.parametrize("fault", ["raise", "die"])
def test_two_failures_are_an_error(tmp_path: Path, fault: str) -> None:
    with pytest.raises(UserError, match=r"seed 9, step [23].*; it failed 2 times"):
        evaluate(Network(), failing(tmp_path, fault, times=2), SEEDS, num_envs=3, workers=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_process_that_dies_unasked() -> None:
    """While the policy thinks: the kernel needed memory, say."""

    class Killer(Separate):
        killed = False

        def predict(self, observations: Any, generators: Sequence[torch.Generator]) -> Tensor:
            if not self.killed:
                (child,) = multiprocessing.active_children()
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                child.join()
            self.killed = True
            return super().predict(observations, generators)

    episodes = evaluate(Killer(), SPEC, SEEDS[:3], num_envs=2, workers=1)
    assert same(episodes, evaluate(Separate(), SPEC, SEEDS[:3]))
    assert [episode.restarts for episode in episodes] == [1, 1, 0]


def test_mistakes_are_said_as_in_this_process_and_not_repeated(tmp_path: Path) -> None:
    class Diverged(Network):
        calls = 0

        def predict(self, observations: Any, generators: Sequence[torch.Generator]) -> Tensor:
            self.calls += 1
            return super().predict(observations, generators) * float("nan")

    policy = Diverged()
    with pytest.raises(UserError, match="action is not finite in the episode with seed 6, step 0"):
        evaluate(policy, SPEC, SEEDS[:1], workers=1)
    assert policy.calls == 1
    with pytest.raises(UserError, match="'nobody/Here-v0' cannot be made"):
        evaluate(Network(), replace(SPEC, id="nobody/Here-v0"), SEEDS, workers=1)
    with pytest.raises(UserError, match=r"DoprFaulty-v0 cannot be made.*unexpected keyword argument 'nonsense'"):
        evaluate(Network(), replace(SPEC, kwargs={"nonsense": 1}), SEEDS, workers=1)
    with pytest.raises(
        UserError, match=r"cannot be made: its process died while starting, see its message above \(exit status 3\)"
    ):
        evaluate(Network(), replace(SPEC, kwargs={"fault": "make"}), SEEDS, workers=1)
    with pytest.raises(UserError, match="workers=-1"):
        evaluate(Network(), SPEC, SEEDS, workers=-1)
