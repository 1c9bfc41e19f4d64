from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import faulty_environment
import numpy as np
import pytest
import torch
from torch import Tensor
from toy_environment import SPEC, Toy, forget, length

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.evaluate import Episode, check_success, evaluate
from dopr_lightning.rollout.slot import EnvSlot, SimulationError

SEEDS = [11, 3, 4, 8, 5, 21, 2, 9, 14]


@pytest.fixture(autouse=True)
def watch() -> None:
    forget()


class Feedback:
    """a = -gain x, repeated `act` times; keeps what it was shown."""

    observation_dim = 2
    action_dim = 1

    def __init__(self, gain: float = 0.5, observe: int = 1, act: int = 1, noise: float = 0.0) -> None:
        self.gain, self.observe, self.act, self.noise = gain, observe, act, noise
        self.seen: list[Tensor] = []

    def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        assert not torch.is_grad_enabled()
        assert observations.dtype == torch.float32
        assert observations.shape[1:] == (self.observe, self.observation_dim)
        self.seen.append(observations)
        noise = torch.stack([torch.randn(self.act, self.action_dim, generator=g) for g in generators])
        mean = -self.gain * observations[:, -1:, :1]
        return mean.expand(-1, self.act, self.action_dim) + self.noise * noise


def states(seed: int, act: int) -> list[float]:
    """x after each step of Feedback(0.5), by hand: the action is -x/2 of the last look, at most 1 in size."""
    x, visited = seed / 2, []
    action = 0.0
    for t in range(length(seed)):
        if t % act == 0:
            action = -min(1.0, x / 2)  # x starts positive and never changes sign before the next look
        x += action
        visited.append(x)
    return visited


@pytest.mark.parametrize("num_envs", [1, 4, 20])
@pytest.mark.parametrize("act", [1, 2, 8])
def test_returns_in_closed_form(num_envs: int, act: int) -> None:
    episodes = evaluate(Feedback(act=act), SPEC, SEEDS, num_envs)
    assert [e.seed for e in episodes] == SEEDS
    for episode in episodes:
        x = states(episode.seed, act)
        assert episode.length == length(episode.seed)
        assert episode.return_ == pytest.approx(sum(x), abs=1e-5)
        assert episode.max_reward == pytest.approx(max(x), abs=1e-5)
        assert episode.value == episode.return_
        assert episode.success is (True if episode.seed % 2 == 0 else None)


@pytest.mark.parametrize("num_envs", [1, 4, 20])
def test_each_seed_once_and_no_step_wasted(num_envs: int) -> None:
    told: list[Episode] = []
    episodes = evaluate(Feedback(act=2), SPEC, SEEDS, num_envs, progress=told.append)
    assert sorted(Toy.resets) == sorted(SEEDS)
    assert {seed: Toy.steps[seed] for seed in SEEDS} == {seed: length(seed) for seed in SEEDS}
    assert sorted(told, key=lambda e: e.seed) == sorted(episodes, key=lambda e: e.seed)
    assert Toy.open_environments == 0


def test_the_metric_chooses_the_value() -> None:
    episodes = evaluate(Feedback(), replace(SPEC, metric="max_reward"), SEEDS)
    assert [e.value for e in episodes] == [e.max_reward for e in episodes]


def test_a_metric_that_there_is_not() -> None:
    with pytest.raises(UserError, match="DoprToy-v0: metric 'reward'; choose one of return, max_reward, success"):
        replace(SPEC, metric="reward")  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, -1])
def test_an_episode_without_end(steps: int) -> None:
    """Gymnasium takes -1 for no limit."""
    with pytest.raises(UserError, match=f"DoprToy-v0: max_steps={steps}; must be at least 1"):
        replace(SPEC, max_steps=steps)


def test_a_seed_below_zero() -> None:
    with pytest.raises(UserError, match="DoprToy-v0: first_seed=-3; must be at least 0"):
        replace(SPEC, first_seed=-3)


def test_success_as_the_metric() -> None:
    spec = replace(faulty_environment.SPEC, metric="success")  # where the seed is a multiple of 3, at step 4 of 5 to 7
    episodes = evaluate(Feedback(act=3), spec, [3, 4, 6, 8])
    assert [e.value for e in episodes] == [1.0, 0.0, 1.0, 0.0]
    assert [e.success for e in episodes] == [True, False, True, False]
    check_success(spec, episodes)


def test_success_that_not_every_episode_reports() -> None:
    """Here those of even seeds do."""
    spec = replace(SPEC, metric="success")
    episodes = evaluate(Feedback(), spec, [3, 4, 5, 8])
    assert [e.value for e in episodes] == [0.0, 1.0, 0.0, 1.0]
    assert [e.success for e in episodes] == [None, True, None, True]
    check_success(spec, episodes)
    check_success(SPEC, episodes[:1])
    with pytest.raises(
        UserError, match=r"DoprToy-v0 reports no 'is_success' in any of 1 episodes; have it report fail"
    ):
        check_success(spec, episodes[:1])


def test_the_actions_are_kept() -> None:
    """As the policy gave them, and only those executed."""
    policy = Feedback(act=4)
    (episode,) = evaluate(policy, SPEC, [7])  # 6 steps: looks at t = 0, 4
    shown = torch.cat(policy.seen)[:, -1, 0]
    np.testing.assert_array_equal(episode.actions, -0.5 * shown.repeat_interleave(4)[:6, None].numpy())


def test_cameras() -> None:
    """States as without, and each camera's latest frames, channels first."""

    class Looking(Feedback):
        def __init__(self) -> None:
            super().__init__(observe=3, act=2)
            self.images: list[dict[str, Tensor]] = []

        def predict(self, observations: Any, generators: Sequence[torch.Generator]) -> Tensor:
            assert set(observations) == {"state", "images"}
            self.images.append(observations["images"])
            return super().predict(observations["state"], generators)

    flat, looking = Feedback(observe=3, act=2), Looking()
    cameras = ("wrist", "front")  # of three
    kwargs = {"cameras": ("front", "side", "wrist")}
    spec = replace(faulty_environment.SPEC, cameras=cameras, kwargs=kwargs)
    episodes = evaluate(looking, spec, [3, 4], num_envs=2)
    assert episodes == evaluate(flat, faulty_environment.SPEC, [3, 4], num_envs=2)
    assert all(torch.equal(one, other) for one, other in zip(flat.seen, looking.seen, strict=True))
    clocks = [window[0, :, 1].tolist() for window in looking.seen]
    assert clocks[:3] == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]
    for images, states in zip(looking.images, looking.seen, strict=True):
        assert set(images) == set(cameras)
        for camera, number in (("wrist", 2), ("front", 0)):
            assert images[camera].dtype == torch.uint8
            assert images[camera].shape == (len(states), 3, 3, 4, 6)
            pixel = images[camera][:, :, :, 1, 2]
            assert torch.equal(pixel[..., 0], states[..., 1].to(torch.uint8))  # red is the time
            assert (pixel[..., 1] == number).all()
            assert (pixel[..., 2] == 255).all()
            assert images[camera].sum() == pixel.sum()


def test_the_window_rolls_and_starts_padded() -> None:
    policy = Feedback(observe=3, act=2)
    evaluate(policy, SPEC, [7])  # 6 steps: looks at t = 0, 2, 4
    clocks = [window[0, :, 1].tolist() for window in policy.seen]
    assert clocks == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]


def test_calls_are_batched_and_free_environments_refilled() -> None:
    policy = Feedback()
    evaluate(policy, SPEC, list(range(8)), num_envs=4)  # lengths 3 4 5 6 3 4 5 6
    # Steps taken by four environments, refilled in the round after one is free: 7, 8, 9, 10 or so rounds.
    sizes = [len(window) for window in policy.seen]
    assert sizes[0] == 4
    assert sum(sizes) == sum(length(seed) for seed in range(8))
    assert len(sizes) <= 12  # 6 + 6, as lockstep would need, at most


def test_noise_belongs_to_the_episode() -> None:
    seeds = range(5)  # x starts within reach of actions that are not clipped, so the noise shows
    alone = {seed: evaluate(Feedback(noise=0.1), SPEC, [seed])[0] for seed in seeds}
    together = evaluate(Feedback(noise=0.1), SPEC, seeds[::-1], num_envs=3)
    for episode in together:
        assert episode.return_ == pytest.approx(alone[episode.seed].return_, abs=1e-5)
    quiet = evaluate(Feedback(), SPEC, seeds)
    assert all(abs(alone[e.seed].return_ - e.return_) > 1e-3 for e in quiet)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    evaluate(Feedback(noise=1.0), SPEC, SEEDS)
    assert torch.equal(before, torch.get_rng_state())


class Linear:
    """A fixed random linear policy for Hopper."""

    observe, act, observation_dim, action_dim = 2, 3, 11, 3

    def __init__(self) -> None:
        self.weight = np.random.default_rng(0).normal(size=(22, 9)).astype(np.float32) / 10

    def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        # One row at a time: batched products may round differently, and this test wants equality.
        rows = [row.numpy().reshape(-1) @ self.weight for row in observations]
        return torch.from_numpy(np.stack(rows)).reshape(-1, 3, 3)


def test_a_simulator_does_not_notice_its_neighbours() -> None:
    spec = EnvironmentSpec("Hopper-v5", 1000, "return")
    one, four = (evaluate(Linear(), spec, range(100, 109), num_envs) for num_envs in (1, 4))
    assert one == four
    assert len({episode.return_ for episode in one}) == 9


def test_every_evaluation_starts_from_the_same_states() -> None:
    """Also where a reset without a seed would go on with the generator of the episode before."""
    spec = faulty_environment.SPEC
    first = evaluate(Feedback(), spec, SEEDS, num_envs=1)
    assert len({episode.return_ for episode in first}) == len(SEEDS)
    assert evaluate(Feedback(), spec, SEEDS, num_envs=1) == first
    assert evaluate(Feedback(), spec, SEEDS[::-1], num_envs=4)[::-1] == first


def test_a_simulator_starts_from_the_same_state_again() -> None:
    slot = EnvSlot(EnvironmentSpec("Hopper-v5", 1000, "return"), observe=1)
    chunk = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)

    def episode(seed: int) -> np.ndarray:
        return np.concatenate([part.observations[0].state for part in (slot.start(seed), slot.execute(chunk))])

    first, other = episode(5), episode(6)
    assert not np.array_equal(first[:11], other[:11])
    np.testing.assert_array_equal(episode(5), first)
    slot.close()
    np.testing.assert_array_equal(episode(5), first)  # in a new environment
    slot.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_action_names_seed_and_step(value: float) -> None:
    class Diverged(Feedback):
        def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            actions = super().predict(observations, generators)
            actions = actions.clone()
            actions[observations[:, -1, 1] == 2] = value
            return actions

    with pytest.raises(UserError, match=r"not finite in the episode with seed 11, step 2"):
        evaluate(Diverged(), SPEC, [11])
    assert Toy.open_environments == 0


@pytest.mark.parametrize(("fault", "said"), [("raise", "RuntimeError: the simulator fell over"), ("nan", "not finite")])
def test_a_failing_environment_names_its_seed(fault: str, said: str) -> None:
    with pytest.raises(UserError, match=f"seed 5, step 1.*{said}"):
        evaluate(Feedback(), replace(SPEC, kwargs={"fault": (fault, 5)}), SEEDS, num_envs=3)
    assert Toy.open_environments == 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (0, np.zeros(3), r"observation is float64 of shape \(3,\), and its space is Box"),
        (0, "nothing", r"observation is <U7 of shape \(\)"),
        (0, [[1], [2, 3]], "ValueError: setting an array element"),
        (1, None, "reward is None, no finite number"),
        (1, math.nan, "reward is nan, no finite number"),
        (1, np.ones(2), "reward is array.*no finite number"),
        (4, {"is_success": np.array([True, False])}, "is_success is array.*no finite number"),
    ],
)
def test_what_a_step_gives_must_be_what_it_is_taken_for(
    field: int, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = Toy.step

    def odd(self: Toy, action: Any) -> Any:
        given = list(works(self, action))
        if self.t == 2:
            given[field] = value
        return tuple(given)

    monkeypatch.setattr(Toy, "step", odd)
    with pytest.raises(SimulationError, match=f"DoprToy-v0 failed in the episode with seed 5, step 2: .*{said}"):
        evaluate(Feedback(), SPEC, [5])
    assert Toy.open_environments == 0


def test_success_that_is_none_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    works = Toy.step
    monkeypatch.setattr(Toy, "step", lambda self, action: (*works(self, action)[:4], {"is_success": None}))
    (episode,) = evaluate(Feedback(), SPEC, [4])
    assert episode.success is None


def test_an_image_must_be_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(faulty_environment.SPEC, kwargs={"cameras": ["front"]}, cameras=("front",))
    observes = faulty_environment.Faulty._observe

    def as_floats(self: Any) -> Any:
        seen = observes(self)
        return {"state": seen["state"], "images": {"front": seen["images"]["front"] / 255}}

    monkeypatch.setattr(faulty_environment.Faulty, "_observe", as_floats)
    with pytest.raises(SimulationError, match="image of camera 'front' is float64"):
        evaluate(Feedback(), spec, [4])


def test_a_policy_for_another_environment() -> None:
    with pytest.raises(UserError, match=r"\(11,\) to actions of shape \(3,\), but DoprToy-v0 has \(2,\) and \(1,\)"):
        evaluate(Linear(), SPEC, SEEDS)
    assert Toy.resets == []
    assert Toy.open_environments == 0


def test_a_policy_whose_camera_is_not_there() -> None:
    policy: Any = Feedback()
    policy.cameras = ("front",)
    with pytest.raises(UserError, match="the policy sees through camera 'front', and DoprToy-v0 has no images"):
        evaluate(policy, SPEC, SEEDS)
    assert Toy.resets == []


def test_a_policy_that_returns_another_shape() -> None:
    policy = Feedback(act=2)
    short = Feedback(act=1)
    policy.predict = short.predict  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"\(3, 1, 1\).*must return \(3, 2, 1\)"):
        evaluate(policy, SPEC, [1, 2, 3])


def test_arguments() -> None:
    with pytest.raises(UserError, match="repeat"):
        evaluate(Feedback(), SPEC, [1, 2, 1])
    with pytest.raises(UserError, match="num_envs=0"):
        evaluate(Feedback(), SPEC, [1], num_envs=0)
    assert evaluate(Feedback(), SPEC, []) == []
