"""Against Rodrigues' formula, written out."""

from __future__ import annotations

import numpy as np
import pytest

from dopr_lightning.data.robomimic.rotations import (
    actions_from_six,
    axis_angle_from_six,
    six_from_actions,
    six_from_axis_angle,
)


def rodrigues(vector: np.ndarray) -> np.ndarray:
    """exp of the cross-product matrix, (3, 3)."""
    angle = np.linalg.norm(vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def vectors(count: int, longest: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((count, 3))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True) * rng.uniform(0, longest, (count, 1))


def test_the_two_columns_are_those_of_the_matrix() -> None:
    for vector in [*vectors(50, 6.0), np.zeros(3), np.array([np.pi, 0, 0])]:
        matrix = rodrigues(vector)
        np.testing.assert_allclose(six_from_axis_angle(vector), [*matrix[:, 0], *matrix[:, 1]], atol=1e-14)


def test_back_again() -> None:
    """The same vector below a half turn; beyond it the shorter one of the same rotation."""
    below = vectors(200, np.pi - 1e-3)
    np.testing.assert_allclose(axis_angle_from_six(six_from_axis_angle(below)), below, atol=1e-12)
    beyond = vectors(50, 9.0).reshape(5, 10, 3)
    back = axis_angle_from_six(six_from_axis_angle(beyond))
    assert back.shape == beyond.shape
    for one, other in zip(beyond.reshape(-1, 3), back.reshape(-1, 3), strict=True):
        np.testing.assert_allclose(rodrigues(one), rodrigues(other), atol=1e-12)


def test_six_numbers_are_continuous_where_axis_angle_jumps() -> None:
    before, after = np.array([0, 0, np.pi - 1e-6]), np.array([0, 0, -np.pi + 1e-6])
    np.testing.assert_allclose(six_from_axis_angle(before), six_from_axis_angle(after), atol=3e-6)


def test_what_a_network_says_is_made_a_rotation() -> None:
    """Lengths, and the share of the first column in the second, do not matter: Gram-Schmidt."""
    rng = np.random.default_rng(1)
    for vector in vectors(50, 3.0):
        matrix = rodrigues(vector)
        a, b, c = rng.uniform(0.1, 5.0), rng.uniform(0.1, 5.0), rng.standard_normal()
        said = np.concatenate([a * matrix[:, 0], b * matrix[:, 1] + c * matrix[:, 0]])
        np.testing.assert_allclose(rodrigues(axis_angle_from_six(said)), matrix, atol=1e-12)


@pytest.mark.parametrize("said", [[0, 0, 0, 0, 0, 0], [0, 2, 0, 0, -3, 0], [0, 2, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
def test_what_means_no_rotation_gives_one_all_the_same(said: list[float]) -> None:
    matrix = rodrigues(axis_angle_from_six(np.array(said, dtype=float)))
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)
    if any(said[:3]):
        np.testing.assert_allclose(matrix[:, 0], [0, 1, 0], atol=1e-12)


def test_actions_of_two_arms() -> None:
    """Positions and grippers stay, rotations change, each arm by itself."""
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (6, 14))
    six = six_from_actions(actions)
    assert six.shape == (6, 20)
    for arm in (0, 1):
        np.testing.assert_array_equal(six[:, 10 * arm : 10 * arm + 3], actions[:, 7 * arm : 7 * arm + 3])
        np.testing.assert_array_equal(six[:, 10 * arm + 9], actions[:, 7 * arm + 6])
        matrix = rodrigues(actions[4, 7 * arm + 3 : 7 * arm + 6])
        np.testing.assert_allclose(six[4, 10 * arm + 3 : 10 * arm + 9], matrix[:, :2].T.reshape(-1), atol=1e-14)
    np.testing.assert_allclose(actions_from_six(six), actions, atol=1e-12)
    np.testing.assert_allclose(actions_from_six(six.reshape(2, 3, 20)), actions.reshape(2, 3, 14), atol=1e-12)
