"""Files written here in the published layout; how they do in the simulator is test_lift.py's question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from robomimic_file import COLUMN, LENGTHS, env_args, write
from scipy.spatial.transform import Rotation

from dopr_lightning.data.robomimic import HORIZONS, KEYS, Robomimic
from dopr_lightning.data.robomimic.absolute import gripper_poses
from dopr_lightning.data.robomimic.controllers import arm_controllers
from dopr_lightning.data.robomimic.files import DemoFile, DemoWriter
from dopr_lightning.data.windows import WindowDataset
from dopr_lightning.errors import UserError

BOTH = pytest.mark.parametrize("robosuite", ["1.4.1", "1.5.1"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "low_dim.hdf5")


@BOTH
def test_demonstrations(tmp_path: Path, robosuite: str) -> None:
    """Keys side by side as asked, demo_10 after demo_2, as h5py reads them."""
    path = write(tmp_path / "low_dim.hdf5", robosuite=robosuite)
    keys = ("robot0_gripper_qpos", "object")
    data = Robomimic(path=str(path), keys=keys).load()
    assert data.episode_ends.tolist() == np.cumsum(LENGTHS).tolist()
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.source.endswith(path.name)
    assert str(path.parent) not in data.source
    with h5py.File(path) as file:
        demos = [file["data"][name] for name in ("demo_0", "demo_2", "demo_10")]
        for demo, start, end in zip(demos, [0, *data.episode_ends], data.episode_ends, strict=False):
            seen = np.concatenate([demo[f"obs/{key}"][:] for key in keys], axis=1)
            np.testing.assert_array_equal(data.observations[start:end], seen.astype(np.float32))
            np.testing.assert_array_equal(data.actions[start:end], demo["actions"][:].astype(np.float32))


def test_a_mask_chooses(path: Path) -> None:
    train, valid = (Robomimic(path=str(path), filter_key=key).load() for key in ("train", "valid"))
    whole = Robomimic(path=str(path)).load()
    cut = sum(LENGTHS[:2])
    np.testing.assert_array_equal(train.actions, whole.actions[:cut])  # the mask names them in another order
    np.testing.assert_array_equal(valid.actions, whole.actions[cut:])
    assert [*train.numbers, *valid.numbers] == [0, 1, 2]  # of the file


@pytest.mark.parametrize(("observe", "horizon", "act"), [(1, 1, 1), (2, 8, 4), (3, 6, 4), (2, 9, 8)])
def test_windows_are_those_of_robomimic(path: Path, observe: int, horizon: int, act: int) -> None:
    """SequenceDataset pads alike; of its windows, one for each step, those late ones are missing in which less than
    ``act`` actions are left, since ours begin where a policy would act."""
    pytest.importorskip("robomimic", reason="pip install 'dopr-lightning[robomimic]'")
    from robomimic.utils.dataset import SequenceDataset

    theirs = SequenceDataset(
        str(path),
        obs_keys=KEYS,
        dataset_keys=("actions",),
        frame_stack=observe,
        seq_length=horizon - observe + 1,
        hdf5_use_swmr=False,
    )
    ours = WindowDataset(Robomimic(path=str(path)).load(), observe, horizon, act)
    window = 0
    for episode, length in enumerate(LENGTHS):
        for step in range(length + observe + act - horizon - 1):
            wanted = theirs[sum(LENGTHS[:episode]) + step]
            seen = np.concatenate([wanted["obs"][key][:observe] for key in KEYS], axis=1).astype(np.float32)
            np.testing.assert_array_equal(ours[window]["observation"], seen)
            np.testing.assert_array_equal(ours[window]["action"], wanted["actions"].astype(np.float32))
            window += 1
    assert window == len(ours)


@BOTH
def test_absolute_actions(tmp_path: Path, robosuite: str) -> None:
    """The pose of the column's site, in closed form, moved by the scaled offset."""
    path = write(tmp_path / "low_dim.hdf5", robosuite=robosuite)
    stored, poses = (Robomimic(path=str(path), absolute=absolute).load() for absolute in (False, True))
    np.testing.assert_array_equal(poses.observations, stored.observations)
    assert poses.actions.shape == (sum(LENGTHS), 10)
    with h5py.File(path) as file:
        states = np.concatenate([file["data"][name]["states"][:] for name in ("demo_0", "demo_2", "demo_10")])
    turn, rise = states[:, 1], states[:, 2]
    position = np.stack([0.5 * np.cos(turn), 0.5 * np.sin(turn), rise], axis=1) + 0.05 * stored.actions[:, :3]
    hand = Rotation.from_rotvec(np.pi / 2 * np.array([0, 0, 1]))
    column = Rotation.from_rotvec(turn[:, None] * [0, 0, 1])
    matrix = (Rotation.from_rotvec(0.5 * stored.actions[:, 3:6]) * column * hand).as_matrix()
    np.testing.assert_allclose(poses.actions[:, :3], position, atol=1e-6)
    np.testing.assert_allclose(poses.actions[:, 3:6], matrix[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(poses.actions[:, 6:9], matrix[:, :, 1], atol=1e-6)
    np.testing.assert_array_equal(poses.actions[:, 9], stored.actions[:, 6])


def test_two_arms_in_one_scene() -> None:
    one, other = (COLUMN.format(arm=arm, y=y, side="right_") for arm, y in ((0, -1), (1, 1)))
    body = other[other.index("<body") : other.index("</worldbody>")]
    positions, rotations = gripper_poses(one.replace("</worldbody>", body + "</worldbody>"), np.zeros((2, 9)))
    np.testing.assert_allclose(positions, [[[0.5, -1, 0], [0.5, 1, 0]]] * 2, atol=1e-7)
    assert rotations.shape == (2, 2, 3, 3)


@BOTH
@pytest.mark.parametrize("absolute", [False, True])
def test_the_environment(tmp_path: Path, robosuite: str, absolute: bool) -> None:
    path = write(tmp_path / "low_dim.hdf5", robosuite=robosuite)
    spec = Robomimic(path=str(path), absolute=absolute).environment
    assert (spec.max_steps, spec.metric, spec.first_seed, spec.extra) == (400, "success", 100_000, "robomimic")
    assert spec.kwargs == {"env_args": env_args(robosuite), "keys": list(KEYS), "absolute": absolute}
    json.dumps(spec.kwargs)  # goes into checkpoints
    assert Robomimic(path=str(path), max_steps=50).environment.max_steps == 50


def test_horizons_are_those_of_robomimic() -> None:
    """What the installed package says of its files for robosuite 1.4.1; those for 1.5 say the same."""
    registry = pytest.importorskip("robomimic", reason="pip install 'dopr-lightning[robomimic]'").DATASET_REGISTRY
    for kind in ("ph", "mh"):
        theirs = {
            task: kinds[kind]["low_dim"]["horizon"]
            for task, kinds in registry.items()
            if kind in kinds and "low_dim" in kinds[kind]
        }
        assert HORIZONS[kind] == theirs


@BOTH
def test_controllers_are_alike_in_both_versions(robosuite: str) -> None:
    """Offsets in the world's frame: 1.4 knew no other, 1.5 would take the robot's."""
    args = env_args(robosuite, robots=["Panda", "Panda"])
    for absolute, kind in ((False, "delta"), (True, "absolute")):
        arms = arm_controllers(args, absolute)
        assert [(arm["type"], arm["input_ref_frame"], arm["input_type"]) for arm in arms] == [
            ("OSC_POSE", "world", kind)
        ] * 2
    assert args == env_args(robosuite, robots=["Panda", "Panda"])  # as it was


def with_images(path: Path) -> Path:
    """Every pixel says which step it is of."""
    step = 0
    with h5py.File(path, "r+") as file:
        for name in ("demo_0", "demo_2", "demo_10"):
            demo = file["data"][name]
            for camera, side in (("sideview", 6), ("robot0_eye_in_hand", 4)):
                frames = step + np.arange(demo.attrs["num_samples"], dtype=np.uint8)
                images = np.broadcast_to(frames[:, None, None, None], (len(frames), side, side, 3))
                demo.create_dataset(f"obs/{camera}_image", data=images, compression="gzip")
            step += len(frames)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOPR_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "robomimic" / "frames"


def test_images(path: Path, home: Path) -> None:
    """Unpacked once, then read from disk as they are needed; parts of the demonstrations share them."""
    keys = ("robot0_eef_pos", "robot0_gripper_qpos")
    source = Robomimic(path=str(with_images(path)), cameras=("sideview", "robot0_eye_in_hand"), keys=keys)
    data = source.load()
    assert data.cameras == ("sideview", "robot0_eye_in_hand")
    assert data.images is not None
    assert [data.images[camera].shape[1:] for camera in data.cameras] == [(6, 6, 3), (4, 4, 3)]
    for frames in data.images.values():
        assert isinstance(frames, np.memmap)
        np.testing.assert_array_equal(frames[:, 1, 2, 0], np.arange(sum(LENGTHS)))
    assert sorted(file.name for file in home.rglob("*.npy")) == ["robot0_eye_in_hand.npy", "sideview.npy"]
    before = {file: file.stat().st_mtime_ns for file in home.rglob("*")}
    valid = Robomimic(path=str(path), cameras=("sideview",), keys=keys, filter_key="valid").load()
    assert {file: file.stat().st_mtime_ns for file in home.rglob("*")} == before
    first = sum(LENGTHS[:2])
    window = WindowDataset(valid, observe=2, horizon=4, act=3)[5]
    np.testing.assert_array_equal(window["images"]["sideview"][:, 0, 0, 0], [first + 4, first + 5])

    spec = source.environment
    assert spec.cameras == ("sideview", "robot0_eye_in_hand")
    assert spec.kwargs["images"] == {"sideview": 6, "robot0_eye_in_hand": 4}


def test_two_may_write_the_same_file(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that containers share, processes of equal numbers do."""
    source = Robomimic(path=str(with_images(path)), cameras=("sideview",))
    read, others = DemoFile.read, []

    def meanwhile(self: DemoFile, demo: str, key: str) -> Any:
        if key.endswith("_image") and not others:
            others.append(None)
            source.load()
        return read(self, demo, key)

    monkeypatch.setattr(DemoFile, "read", meanwhile)
    images = source.load().images
    assert images is not None
    np.testing.assert_array_equal(images["sideview"][:, 1, 2, 0], np.arange(sum(LENGTHS)))
    assert [file.name for file in home.rglob("*.npy*")] == ["sideview.npy"]

    with DemoFile(path) as file:
        env_args, model = file.env_args, file.model("demo_0")
    target = path.with_name("made.hdf5")
    with DemoWriter(target, env_args) as slow:
        with DemoWriter(target, env_args) as quick:
            quick.add(model, {"actions": np.zeros((2, 7))})
        slow.add(model, {"actions": np.zeros((3, 7))})
    with DemoFile(target) as file:
        assert file.steps("demo_0") == 3
    assert not list(path.parent.glob("*.partial"))


def test_other_images_under_the_same_name_are_unpacked_anew(path: Path, home: Path) -> None:
    """What is kept is kept under the file's digest."""
    source = Robomimic(path=str(with_images(path)), cameras=("sideview",))
    source.load()

    def change(file: Any) -> None:
        file["data/demo_0/obs/sideview_image"][:] = 77

    changed(change)(path)
    images = source.load().images
    assert images is not None
    assert (images["sideview"][: LENGTHS[0]] == 77).all()


def nothing(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def page(path: Path) -> None:
    path.write_text("<html>quota exceeded</html>")


def changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return build


def said(**fields: Any) -> Callable[[Path], None]:
    """With other env_args."""

    def change(file: Any) -> None:
        file["data"].attrs["env_args"] = json.dumps(env_args() | fields)

    return changed(change)


def replaced(name: str, array: np.ndarray) -> Callable[[Path], None]:
    def change(file: Any) -> None:
        del file[name]
        file[name] = array

    return changed(change)


def beyond(file: Any) -> None:
    file["data/demo_2/actions"][5, 3] = -1.7


def without_object(file: Any) -> None:
    del file["data/demo_10/obs/object"]


def without_image(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["data/demo_2/obs/sideview_image"]


def raw(file: Any) -> None:
    for name in file["data"]:
        del file[f"data/{name}/obs"]


def without_model(file: Any) -> None:
    del file["data/demo_2"].attrs["model_file"]


def garbled_model(file: Any) -> None:
    file["data/demo_2"].attrs["model_file"] = file["data/demo_2"].attrs["model_file"][:500]


def without_args(file: Any) -> None:
    del file["data"].attrs["env_args"]


def empty(file: Any) -> None:
    for name in list(file["data"]):
        del file[f"data/{name}"]


def scrambled(file: Any) -> None:
    file["data"].attrs["env_args"] = "{'env_name'"


def robot_frame(file: Any) -> None:
    args = env_args()
    del args["env_kwargs"]["controller_configs"]["body_parts"]["right"]["input_ref_frame"]
    file["data"].attrs["env_args"] = json.dumps(args)


def with_torques(file: Any) -> None:
    args = env_args("1.4.1")
    args["env_kwargs"]["controller_configs"]["type"] = "JOINT_TORQUE"
    file["data"].attrs["env_args"] = json.dumps(args)


def of_poses(file: Any) -> None:
    args = env_args("1.4.1")
    args["env_kwargs"]["controller_configs"]["control_delta"] = False
    file["data"].attrs["env_args"] = json.dumps(args)


BAD: list[tuple[Callable[[Path], object], dict[str, Any], str]] = [
    (nothing, {}, "no such file"),
    (page, {}, "damaged, or not HDF5"),
    (cut, {}, "damaged, or not HDF5"),
    (changed(without_args), {}, "no data with the attribute env_args"),
    (changed(scrambled), {}, "env_args cannot be understood"),
    (changed(empty), {}, "holds no demonstrations"),
    (said(type=2), {}, "of type 2, not of robosuite"),
    (said(env_version="0.3.0"), {}, "robosuite 0.3.0; versions 1.2 to 1.5.*dopr demos robomimic"),
    (said(env_version="1.6.0"), {}, "robosuite 1.6.0"),
    (said(env_kwargs={}), {}, "no robots with controller_configs"),
    (changed(without_object), {}, r"demo_10 has no 'obs/object'; obs has: robot0_eef_pos, .*"),
    (changed(raw), {}, "take the low_dim file"),
    (lambda path: None, {"keys": ("agentview_image",)}, "demo_0 has no 'obs/agentview_image'; obs has: object"),
    (lambda path: None, {"cameras": ("sideview",)}, "no 'obs/sideview_image'; .*; dopr demos robomimic --hdf5 image"),
    (with_images, {"cameras": ("frontview",)}, "demo_0 has no 'obs/frontview_image'; obs has: .*sideview_image"),
    (lambda path: without_image(with_images(path)), {"cameras": ("sideview",)}, "demo_2 has no 'obs/sideview_image'"),
    (
        lambda path: replaced("data/demo_2/obs/sideview_image", np.zeros((12, 5, 5, 3), np.uint8))(with_images(path)),
        {"cameras": ("sideview",)},
        r"demo_2/obs/sideview_image is uint8 of shape \(12, 5, 5, 3\), not uint8 of \(12, 6, 6, 3\)",
    ),
    (
        lambda path: replaced("data/demo_0/obs/sideview_image", np.zeros((9, 6, 5, 3), np.uint8))(with_images(path)),
        {"cameras": ("sideview",)},
        r"demo_0/obs/sideview_image has shape \(9, 6, 5, 3\)",
    ),
    (lambda path: None, {"filter_key": "better"}, "no mask 'better'; choose one of: train, valid"),
    (changed(beyond), {}, r"demo_2, step 5: action 3 is -1.7, outside \[-1, 1\]"),
    (replaced("data/demo_2/actions", np.zeros((12, 14))), {}, "14 numbers per action, .* take 7"),
    (replaced("data/demo_2/actions", np.full((12, 7), np.nan)), {}, "actions hold NaN in episode 1, step 0"),
    (replaced("data/demo_2/obs/object", np.zeros((12, 84, 84, 3), np.uint8)), {}, r"shape \(12, 84, 84, 3\)"),
    (replaced("data/demo_2/obs/object", np.zeros((11, 10))), {}, "12 actions but 11 of obs/object"),
    (replaced("data/demo_2/states", np.zeros((12, 9))), {"absolute": True}, "states have 9 numbers, the scene has 5"),
    (changed(without_model), {"absolute": True}, "demo_2 has no attribute model_file"),
    (changed(garbled_model), {"absolute": True}, "damaged, or not HDF5 .*; fetch it again"),
    (changed(with_torques), {}, "an arm with a controller JOINT_TORQUE"),
    (changed(of_poses), {"absolute": True}, "poses in the frame of the world: use them as stored"),
    (changed(robot_frame), {"absolute": True}, "offsets in the frame of the base: use them as stored"),
]


@pytest.mark.parametrize(("build", "options", "words"), BAD)
def test_what_is_wrong_is_said_with_the_files_name(
    build: Callable[[Path], object], options: dict[str, Any], words: str, path: Path, home: Path
) -> None:
    build(path)
    with pytest.raises(UserError, match=words) as caught:
        Robomimic(path=str(path), **options).load()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(home.rglob("*.np*"))


def test_an_episode_shorter_than_the_horizon(path: Path) -> None:
    data = Robomimic(path=str(path)).load()
    with pytest.raises(UserError, match=r"low_dim.hdf5.*episode 0 has 9 steps, too few for a window of horizon=16"):
        WindowDataset(data, observe=2, horizon=16, act=2)


def test_a_sound_file_of_the_wrong_frame_can_be_used_as_stored(path: Path) -> None:
    """What `absolute` refuses is no fault of the file. Nor are poses beyond 1 metre out of bounds."""
    changed(of_poses)(path)
    changed(beyond)(path)
    assert Robomimic(path=str(path)).load().actions.min() == pytest.approx(-1.7)
    write(path)
    changed(robot_frame)(path)
    assert Robomimic(path=str(path)).load().num_episodes == len(LENGTHS)
    with pytest.raises(UserError, match="use them as stored"):
        _ = Robomimic(path=str(path), absolute=True).environment


def test_nothing_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOPR_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"run: dopr demos robomimic --task tool_hang --type ph$"):
        Robomimic(task="tool_hang").load()
    with pytest.raises(UserError, match=r"run: dopr demos robomimic --task can --type mh --hdf5 image$"):
        Robomimic(task="can", dataset_type="mh", cameras=("agentview",)).load()
    with pytest.raises(UserError, match=r"run: dopr demos lift --scripted 50 --images$"):
        Robomimic(dataset_type="scripted", cameras=("agentview",)).load()
    with pytest.raises(UserError, match=r"run: dopr demos lift --scripted 50$"):
        _ = Robomimic(dataset_type="scripted").environment
    with pytest.raises(UserError, match=r"no 'mh' demonstrations of task 'tool_hang'; choose from .*mh: lift, can"):
        Robomimic(task="tool_hang", dataset_type="mh").load()


def test_a_state_of_no_keys(path: Path) -> None:
    with pytest.raises(UserError, match="keys are empty; name at least one low-dimensional observation"):
        Robomimic(path=str(path), keys=())


def test_a_task_of_ones_own_needs_a_horizon(path: Path) -> None:
    with pytest.raises(UserError, match="'stack', ph: no horizon is known; set max_steps"):
        _ = Robomimic(task="stack", path=str(path)).environment
    assert Robomimic(task="stack", path=str(path), max_steps=300).environment.max_steps == 300
