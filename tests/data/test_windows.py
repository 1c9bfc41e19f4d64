from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.windows import WindowDataset, already_batched
from dopr_lightning.errors import UserError

LENGTHS = [9, 20, 8, 31]


def demonstrations(lengths: list[int] = LENGTHS) -> Demonstrations:
    rng = np.random.default_rng(0)
    steps = sum(lengths)
    return Demonstrations(
        rng.normal(size=(steps, 3)).astype(np.float32),
        rng.normal(size=(steps, 2)).astype(np.float32),
        np.cumsum(lengths),
        "toy",
    )


def brute_force(data: Demonstrations, observe: int, horizon: int, act: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pad each episode explicitly as Diffusion Policy does, then slide a window of `horizon` over it."""
    windows = []
    for observations, actions in zip(
        np.split(data.observations, data.episode_ends[:-1]), np.split(data.actions, data.episode_ends[:-1]), strict=True
    ):
        before, after = observe - 1, act - 1
        o = np.concatenate([observations[:1].repeat(before, 0), observations, observations[-1:].repeat(after, 0)])
        a = np.concatenate([actions[:1].repeat(before, 0), actions, actions[-1:].repeat(after, 0)])
        for begin in range(len(o)):
            if begin + horizon <= len(o):
                windows.append((o[begin : begin + observe], a[begin : begin + horizon]))
    return windows


@pytest.mark.parametrize(("observe", "horizon", "act"), [(2, 16, 8), (1, 1, 1), (3, 3, 1), (1, 8, 8), (4, 6, 2)])
def test_windows_equal_a_loop_over_padded_episodes(observe: int, horizon: int, act: int) -> None:
    data = demonstrations()
    dataset = WindowDataset(data, observe, horizon, act)
    expected = brute_force(data, observe, horizon, act)
    assert len(dataset) == len(expected)
    batch = dataset.__getitems__(list(range(len(dataset))))
    np.testing.assert_array_equal(batch["observation"], np.stack([o for o, _ in expected]))
    np.testing.assert_array_equal(batch["action"], np.stack([a for _, a in expected]))
    last = dataset[len(dataset) - 1]
    np.testing.assert_array_equal(last["observation"], expected[-1][0])
    np.testing.assert_array_equal(last["action"], expected[-1][1])


def test_every_step_is_acted_on_when_the_horizon_has_no_slack() -> None:
    # horizon = observe - 1 + act: one window per step, whose action at index observe-1 is that step's.
    data = demonstrations()
    dataset = WindowDataset(data, observe=3, horizon=6, act=4)
    assert len(dataset) == sum(LENGTHS)
    now = dataset.__getitems__(range(len(dataset)))
    np.testing.assert_array_equal(now["action"][:, 2], data.actions)
    np.testing.assert_array_equal(now["observation"][:, -1], data.observations)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_takes_the_batch_as_it_is(num_workers: int) -> None:
    dataset = WindowDataset(demonstrations(), 2, 4, 2)
    loader = DataLoader(dataset, batch_size=5, num_workers=num_workers, collate_fn=already_batched)  # type: ignore[arg-type]
    batches = list(loader)
    assert batches[0]["observation"].shape == (5, 2, 3)
    assert batches[0]["action"].shape == (5, 4, 2)
    assert batches[0]["action"].dtype == torch.float32
    everything = torch.cat([batch["action"] for batch in batches])
    assert torch.equal(everything, dataset.__getitems__(range(len(dataset)))["action"])


def test_a_short_episode_is_named() -> None:
    with pytest.raises(UserError, match=r"episode 2 has 7 steps.*horizon=16"):
        WindowDataset(demonstrations([9, 20, 7]), 2, 16, 8)
    assert len(WindowDataset(demonstrations([8]), 2, 16, 8)) == 1


@pytest.mark.parametrize("short", range(6))
def test_a_short_episode_of_a_part_is_named_as_in_the_whole(short: int) -> None:
    train, validation = demonstrations([7 if episode == short else 20 for episode in range(6)]).split(2, seed=0)
    held_out = 7 in np.diff(validation.episode_ends, prepend=0)
    with pytest.raises(UserError, match=rf"episode {short} has 7 steps"):
        WindowDataset(validation if held_out else train.take(4), 2, 16, 8)


@pytest.mark.parametrize(
    ("sizes", "said"), [((2, 8, 8), "use horizon=9"), ((0, 4, 1), "at least 1"), ((1, 1, 0), "at least 1")]
)
def test_sizes_must_fit_together(sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        WindowDataset(demonstrations(), *sizes)
