"""Arm actions with axis-angle rotations, as controllers take them, and with 6-D rotations, as networks learn them.

Axis-angle jumps where a turn passes pi; the first two columns of the rotation matrix are continuous.
Y. Zhou et al., "On the Continuity of Rotation Representations in Neural Networks", CVPR 2019, arXiv 1812.07035.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

Array = npt.NDArray[np.floating[Any]]

# Position, axis-angle and gripper of one arm; position, two columns and gripper.
AXIS_ANGLE_DIM = 3 + 3 + 1
SIX_DIM = 3 + 6 + 1


def six_from_axis_angle(vector: Array) -> Array:
    """Axis times angle (..., 3) to the first two columns of the rotation matrix, one after the other, (..., 6)."""
    matrix = Rotation.from_rotvec(vector.reshape(-1, 3)).as_matrix()
    return np.concatenate([matrix[:, :, 0], matrix[:, :, 1]], axis=-1).reshape(*vector.shape[:-1], 6)


def axis_angle_from_six(columns: Array) -> Array:
    """Two directions (..., 6), as a network gives them, to axis times angle (..., 3), by Gram-Schmidt.

    The first column keeps its direction, the second its half plane. Where the two are parallel, or one is zero, no
    rotation is meant, and the result is one that has the first column, or the identity.
    """
    first, second = columns[..., :3], columns[..., 3:]
    x = _unit(first, np.broadcast_to([1.0, 0.0, 0.0], first.shape))
    y = second - np.sum(x * second, axis=-1, keepdims=True) * x
    # For a parallel second column: the axis least along x, made orthogonal.
    spare = np.eye(3)[np.argmin(np.abs(x), axis=-1)]
    spare = spare - np.sum(x * spare, axis=-1, keepdims=True) * x
    y = _unit(y, spare / np.linalg.norm(spare, axis=-1, keepdims=True))
    matrix = np.stack([x, y, np.cross(x, y)], axis=-1)
    return Rotation.from_matrix(matrix.reshape(-1, 3, 3)).as_rotvec().reshape(*columns.shape[:-1], 3)


def six_from_actions(actions: Array) -> Array:
    """Actions of k arms (..., 7k) to (..., 10k): axis-angle becomes 6-D, arm by arm."""
    arms = actions.reshape(*actions.shape[:-1], -1, AXIS_ANGLE_DIM)
    six = np.concatenate([arms[..., :3], six_from_axis_angle(arms[..., 3:6]), arms[..., 6:]], axis=-1)
    return six.reshape(*actions.shape[:-1], -1)


def actions_from_six(six: Array) -> Array:
    """Actions of k arms (..., 10k) back to (..., 7k)."""
    arms = six.reshape(*six.shape[:-1], -1, SIX_DIM)
    actions = np.concatenate([arms[..., :3], axis_angle_from_six(arms[..., 3:9]), arms[..., 9:]], axis=-1)
    return actions.reshape(*six.shape[:-1], -1)


def _unit(vector: Array, otherwise: Array) -> Array:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    degenerate = length < 1e-8
    return np.where(degenerate, otherwise, vector / np.where(degenerate, 1.0, length))
