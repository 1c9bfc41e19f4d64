"""Scripted demonstrations of Lift, and the self-test that plays a file again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from robomimic_file import env_args, needs_opengl, needs_robosuite

from dopr_lightning.cli import main
from dopr_lightning.data.robomimic import KEYS, Robomimic, lift
from dopr_lightning.data.robomimic.images import add_images
from dopr_lightning.data.robomimic.replay import replay
from dopr_lightning.data.robomimic.simulator import Simulator
from dopr_lightning.errors import UserError

pytestmark = needs_robosuite

TABLE = 0.8


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lift") / "low_dim.hdf5"
    made = lift.demonstrate(path, 2, seed=3)
    assert (made.path, made.episodes, made.tried) == (path, 2, 2)
    assert made.steps == len(Robomimic(path=str(path)).load().actions)
    return path


def changed(path: Path, target: Path, change: Callable[[Any], None]) -> Path:
    target.write_bytes(path.read_bytes())
    with h5py.File(target, "r+") as file:
        change(file)
    return target


def of_robosuite_1_4(path: Path, target: Path) -> Path:
    """The same demonstrations, as robosuite 1.4 would have recorded them."""

    def change(file: Any) -> None:
        file["data"].attrs["env_args"] = json.dumps(env_args("1.4.1"))
        for demo in file["data"].values():
            demo.attrs["model_file"] = demo.attrs["model_file"].replace("gripper0_right_", "gripper0_")
            demo["obs/object"][:, 7:] *= -1

    return changed(path, target, change)


def test_what_is_recorded(recorded: Path) -> None:
    """robomimic's layout, in bounds, each row what was seen before the action; the cube ends up lifted."""
    with h5py.File(recorded) as file:
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "Lift"
        masks = [{name.decode() for name in file[f"mask/{key}"][:]} for key in ("train", "valid")]
        assert masks[0] | masks[1] == set(file["data"])
        assert not masks[0] & masks[1]
        assert file["data"].attrs["total"] == sum(demo.attrs["num_samples"] for demo in file["data"].values())
        scenes = set()
        for demo in file["data"].values():
            steps = demo.attrs["num_samples"]
            assert demo["actions"].shape == (steps, 7)
            assert np.abs(demo["actions"]).max() <= 1
            for key in demo["obs"]:
                assert len(demo[f"obs/{key}"]) == steps
                np.testing.assert_array_equal(demo[f"obs/{key}"][1:], demo[f"next_obs/{key}"][:-1])
            cube = demo["states"][:, 1 + 9 : 1 + 12]  # after seven joints and two fingers
            np.testing.assert_allclose(demo["obs/object"][:, :3], cube, atol=1e-12)
            scenes.add(tuple(cube[0]))
            assert cube[0, 2] < TABLE + 0.035
            assert demo["next_obs/object"][-1, 2] > TABLE + 0.04
            assert demo["rewards"][:].sum() == lift.HELD_STEPS
        assert len(scenes) == 2


def test_the_seed_decides(recorded: Path, tmp_path: Path) -> None:
    """Demonstration 1 of seed 3 is demonstration 0 of seed 4."""
    lift.demonstrate(tmp_path / "again.hdf5", 1, seed=4)
    with h5py.File(recorded) as file, h5py.File(tmp_path / "again.hdf5") as again:
        for key in ("states", "actions", "obs/object"):
            np.testing.assert_array_equal(again["data/demo_0"][key], file["data/demo_1"][key])
        assert again["data/demo_0"].attrs["model_file"] == file["data/demo_1"].attrs["model_file"]


@pytest.mark.parametrize("absolute", [False, True])
def test_replay(recorded: Path, absolute: bool) -> None:
    """Exact but for the six digits of the XML; also when the offsets have become poses with 6-D rotations and back."""
    played = list(replay(recorded, absolute=absolute))
    assert [one.demo for one in played] == ["demo_0", "demo_1"]
    for one in played:
        assert one.solved
        assert one.deviation < 1e-4
        assert set(one.observations) == set(KEYS)
        assert max(one.observations.values()) < 1e-6


def test_a_file_of_robosuite_1_4(recorded: Path, tmp_path: Path) -> None:
    """Other names in the scene, other controller settings, another sign in ``object``: all undone.

    The cube is the simulator's own and up to a millimetre smaller or larger, so the paths differ by about that.
    """
    old = of_robosuite_1_4(recorded, tmp_path / "old.hdf5")
    for absolute in (False, True):
        for one in replay(old, 1, absolute):
            assert one.solved
            assert one.deviation < 0.02
            assert max(one.observations.values()) < 1e-6
    np.testing.assert_allclose(
        Robomimic(path=str(old), absolute=True).load().actions,
        Robomimic(path=str(recorded), absolute=True).load().actions,
        atol=1e-6,
    )


def test_drift_is_reported(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Observations that mean something else now; actions that no longer do it."""

    def change(file: Any) -> None:
        file["data/demo_0/obs/object"][:, 7:] *= -1
        file["data/demo_1/actions"][:, 6] = -1.0  # never closes

    drifted = changed(recorded, tmp_path / "drifted.hdf5", change)
    assert main(["demos", "replay", str(drifted)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("demo_0: solved, off its path by up to")
    assert lines[1].startswith("demo_1: not solved, off its path by up to 0.")
    assert lines[2].startswith("1 of 2 are solved again; demo_1 is furthest off its path, by 0.")
    assert "observes otherwise: object (by up to 0." in lines[3]
    assert "robot0_eef_pos" not in lines[3]

    def worse(file: Any) -> None:
        del file["data/demo_0"]

    assert main(["demos", "replay", str(changed(drifted, tmp_path / "worse.hdf5", worse))]) == 2
    assert "worse.hdf5: no demonstration is solved again" in capsys.readouterr().err


def test_states_of_another_scene(recorded: Path, tmp_path: Path) -> None:
    def change(file: Any) -> None:
        del file["data/demo_0/states"]
        file["data/demo_0/states"] = np.zeros((5, 40))

    with pytest.raises(UserError, match="recorded states have 40 numbers, this robosuite's Lift has 32"):
        next(replay(changed(recorded, tmp_path / "other.hdf5", change)))


def test_failures_are_counted_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lift, "MAX_STEPS", 60)
    act = lift.LiftExpert.act
    attempts = iter([0.0, 1.0])

    class Unlucky(lift.LiftExpert):
        def __init__(self, rng: np.random.Generator) -> None:
            super().__init__(rng)
            self.strength = next(attempts)

        def act(self, observation: dict[str, Any]) -> Any:
            return act(self, observation) * self.strength

    monkeypatch.setattr(lift, "LiftExpert", Unlucky)
    kept: list[int] = []
    made = lift.demonstrate(tmp_path / "some.hdf5", 1, seed=3, progress=kept.append)
    assert (made.episodes, made.tried, kept) == (1, 2, [0, 1])


def test_a_script_that_always_fails_gives_up_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lift, "MAX_STEPS", 1)
    monkeypatch.setattr(lift, "MAX_FAILURES", 1)
    with pytest.raises(UserError, match="lifted the cube in 0 of 2 attempts only"):
        lift.demonstrate(tmp_path / "none.hdf5", 1)
    assert list(tmp_path.iterdir()) == []


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the source looks for it without a path; robosuite leaves the environment as it was."""
    monkeypatch.setenv("DOPR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert main(["demos", "lift", "--scripted", "1"]) == 0
    out, err = capsys.readouterr()
    assert "lift: 1 demonstrations, " in out
    assert "in 1 of 1 attempts (100%)" in out
    assert "1/1" in err
    assert "WARNING" not in err
    assert Robomimic(dataset_type="scripted").load().num_episodes == 1
    assert "MUJOCO_GL" not in os.environ
    assert main(["demos", "lift", "--scripted", "0"]) == 2
    assert "--scripted 0: ask for at least 1" in capsys.readouterr().err


def test_recorded_images_are_of_the_moment_of_the_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a camera that sees the time: no OpenGL."""

    class Clock(Simulator):
        def __init__(self, args: dict[str, Any], cameras: Sequence[str]) -> None:
            super().__init__(args)
            assert list(cameras) == ["clock"]

        def render(self, camera: str, size: int) -> Any:
            assert camera == "clock"
            return np.full((size, size, 3), round(self.state[0] * 20), np.uint8)

    monkeypatch.setattr(lift, "Simulator", Clock)
    lift.demonstrate(tmp_path / "seen.hdf5", 1, seed=3, cameras=["clock"])
    with h5py.File(tmp_path / "seen.hdf5") as file:
        frames = file["data/demo_0/obs/clock_image"]
        assert (frames.dtype, frames.chunks) == (np.uint8, (1, 84, 84, 3))
        np.testing.assert_array_equal(frames[:, 5, 5, 0], np.arange(file["data/demo_0"].attrs["num_samples"]))
        kwargs = json.loads(file["data"].attrs["env_args"])["env_kwargs"]
        assert (kwargs["camera_names"], kwargs["camera_heights"], kwargs["use_camera_obs"]) == (["clock"], 84, True)


@needs_opengl
def test_images_are_rendered_from_states(recorded: Path, tmp_path: Path) -> None:
    """Upright: the red cube, lifted, is higher up in the picture."""

    def cut(file: Any) -> None:
        del file["data/demo_1"], file["mask"]
        states = file["data/demo_0/states"][:]
        del file["data/demo_0/states"]
        file["data/demo_0/states"] = states[[0, -1]]

    short = changed(recorded, tmp_path / "short.hdf5", cut)
    add_images(short, tmp_path / "rendered.hdf5", ["agentview"])
    with h5py.File(tmp_path / "rendered.hdf5") as file, h5py.File(short) as source:
        kwargs = json.loads(file["data"].attrs["env_args"])["env_kwargs"]
        assert (kwargs["camera_names"], kwargs["camera_heights"], kwargs["use_camera_obs"]) == (["agentview"], 84, True)
        np.testing.assert_array_equal(file["data/demo_0/actions"], source["data/demo_0/actions"])
        frames = file["data/demo_0/obs/agentview_image"][:].astype(float)
        assert frames.shape == (2, 84, 84, 3)
        red = (frames[..., 0] > 1.8 * frames[..., 1]) & (frames[..., 0] > 80)
        height = [np.argwhere(frame)[:, 0].mean() for frame in red]
        assert height[1] < height[0] - 5
    with pytest.raises(UserError, match="Lift has no camera 'sidecam'; it has: frontview"):
        add_images(short, tmp_path / "none.hdf5", ["sidecam"])
    assert not (tmp_path / "none.hdf5").exists()
