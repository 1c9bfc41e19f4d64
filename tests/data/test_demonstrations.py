from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.errors import UserError

ENDS = [3, 7, 8, 14]


def numbered(ends: list[int] = ENDS) -> Demonstrations:
    """Row i observes (i, i) and acts (i,)."""
    rows = np.arange(ends[-1], dtype=np.float32)
    return Demonstrations(np.stack([rows, rows], 1), rows[:, None], np.array(ends), "toy", "0" * 64)


def episodes_of(demonstrations: Demonstrations) -> list[list[float]]:
    return [part[:, 0].tolist() for part in np.split(demonstrations.actions, demonstrations.episode_ends[:-1])]


ALL = [[0, 1, 2], [3, 4, 5, 6], [7], [8, 9, 10, 11, 12, 13]]


def test_take_is_the_first_episodes() -> None:
    taken = numbered().take(2)
    assert episodes_of(taken) == ALL[:2]
    np.testing.assert_array_equal(taken.observations[:, 1], np.arange(7))
    assert taken.sha256 == "0" * 64


@pytest.mark.parametrize("seed", range(5))
def test_split_parts_whole_episodes(seed: int) -> None:
    train, validation = numbered().split(2, seed)
    assert sorted(episodes_of(train) + episodes_of(validation)) == ALL
    assert episodes_of(train) == sorted(episodes_of(train))  # the original order
    again = numbered().split(2, seed)[1]
    assert episodes_of(again) == episodes_of(validation)


def test_split_depends_on_the_seed() -> None:
    assert len({str(episodes_of(numbered().split(1, seed)[1])) for seed in range(20)}) == 4


@pytest.mark.parametrize("count", [0, 5])
def test_too_many_or_no_episodes(count: int) -> None:
    with pytest.raises(UserError, match=r"'toy'.* 4"):
        numbered().take(count)


@pytest.mark.parametrize("count", [0, 4])
def test_split_leaves_something_on_both_sides(count: int) -> None:
    with pytest.raises(UserError, match="hold out 1 to 3"):
        numbered().split(count, 0)


def test_one_episode_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"'toy': there is one episode.* record another"):
        numbered().take(1).split(1, 0)


@pytest.mark.parametrize("field", ["observations", "actions"])
@pytest.mark.parametrize(
    ("row", "place"), [(0, "episode 0, step 0"), (3, "episode 1, step 0"), (13, "episode 3, step 5")]
)
@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (1e300, "an infinite value")])
def test_bad_values_are_placed(field: str, row: int, place: str, value: float, said: str) -> None:
    good = numbered()
    arrays = {"observations": good.observations.astype(np.float64), "actions": good.actions.astype(np.float64)}
    arrays[field][row, 0] = value
    with pytest.raises(UserError, match=f"'toy': {field} hold {said} in {place}"):
        Demonstrations(**arrays, episode_ends=good.episode_ends, source="toy")  # type: ignore[arg-type]


def test_without_a_digest_it_is_that_of_the_arrays() -> None:
    def digest(**changes: Any) -> str:
        good = replace(numbered(), images={"top": np.zeros((14, 4, 5, 3), np.uint8)}, sha256="")
        return replace(good, sha256="", **changes).sha256

    first = digest()
    assert len(first) == 64
    assert digest() == first
    whole = replace(numbered(), sha256="")
    assert whole.take(2).sha256 == whole.sha256  # of the whole
    seen = np.zeros((14, 4, 5, 3), np.uint8)
    seen[7, 0, 0, 0] = 1  # the first of an episode
    others = [
        digest(observations=1 + numbered().observations),
        digest(actions=1 + numbered().actions),
        digest(episode_ends=np.array([2, 7, 8, 14])),
        digest(images={"top": seen}),
        digest(images={"side": np.zeros_like(seen)}),
        digest(images=None),
    ]
    assert len({first, *others}) == 7


def test_episodes_are_known_by_their_numbers_in_the_whole() -> None:
    whole = numbered()
    part = replace(whole, numbers=[2, 5, 7, 11])  # type: ignore[arg-type]
    train, validation = part.split(2, 0)
    assert sorted([*train.numbers, *validation.numbers]) == [2, 5, 7, 11]
    assert part.take(3).take(2).numbers.tolist() == [2, 5]
    bad = whole.actions.copy()
    bad[7] = np.nan
    with pytest.raises(UserError, match="NaN in episode 7, step 0"):
        replace(part, actions=bad)
    with pytest.raises(UserError, match=r"numbers of shape \(3,\) for 4 episodes"):
        replace(whole, numbers=np.arange(3))


@pytest.mark.parametrize("ends", [[], [0, 14], [7, 7, 14], [9, 3, 14], [7, 13], [7, 15], [[14]]])
def test_ends_must_divide_the_steps(ends: list[int]) -> None:
    good = numbered()
    with pytest.raises(UserError, match="episode ends"):
        Demonstrations(good.observations, good.actions, np.array(ends), "toy")


def test_what_is_no_array_of_numbers() -> None:
    """A list of episodes, of names; each numpy refuses in words of its own."""
    good = numbered()
    for field, value, said in (
        ("observations", [np.zeros((3, 2)), np.zeros((11, 2))], "'toy': observations are no array of numbers .*concat"),
        ("actions", np.full((14, 1), "left"), "'toy': actions are no array of numbers"),
    ):
        arrays: Any = {"observations": good.observations, "actions": good.actions, field: value}
        with pytest.raises(UserError, match=said):
            Demonstrations(**arrays, episode_ends=good.episode_ends, source="toy")


def test_shapes_must_fit() -> None:
    good = numbered()
    with pytest.raises(UserError, match="14 observations but 13 actions"):
        Demonstrations(good.observations, good.actions[:-1], good.episode_ends, "toy")
    with pytest.raises(UserError, match=r"actions have shape \(14,\)"):
        Demonstrations(good.observations, good.actions[:, 0], good.episode_ends, "toy")
