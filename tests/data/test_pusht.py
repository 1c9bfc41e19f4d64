from __future__ import annotations

import functools
import hashlib
import http.server
import json
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
import zarr
from shared_data import shared_data

from dopr_lightning.cli import main
from dopr_lightning.data import pusht
from dopr_lightning.data.pusht import PushT, register
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.environments import make

ARCHIVE = "pusht/pusht_cchi_v7_replay.zarr.zip"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOPR_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "pusht"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def small_archive(path: Path, change: Callable[[Any], None] | None = None) -> Path:
    """An archive with the published layout but for the images: 3 episodes, 30 steps."""
    with zarr.ZipStore(str(path), mode="w") as store:
        root = zarr.group(store)
        rng = np.random.default_rng(0)
        arrays = {
            "data/state": rng.uniform(0, 512, (30, 5)).astype(np.float32),
            "data/action": rng.uniform(0, 512, (30, 2)).astype(np.float32),
            "meta/episode_ends": np.array([10, 21, 30]),
        }
        if change is not None:
            change(arrays)
        for name, array in arrays.items():
            root.array(name, array, chunks=(7, *array.shape[1:]))
    return path


def images_of(steps: int, value: float | None = None) -> Callable[[Any], None]:
    """Adds frames to an archive, noise of whole numbers; or one wrong value near their end."""

    def change(arrays: Any) -> None:
        frames = np.random.default_rng(1).integers(0, 256, (steps, 96, 96, 3)).astype(np.float32)
        if value is not None:
            frames[steps - 2, 5, 5, 1] = value
        arrays["data/img"] = frames

    return change


def test_the_published_file(home: Path) -> None:
    """Against the arrays as someone else extracted them, and as zarr reads them."""
    archive = shared_data(ARCHIVE)
    registered = register(archive)
    assert (registered.episodes, registered.steps, registered.sha256) == (206, 25_650, pusht.SHA256)
    filmed = PushT(images=True).load()
    assert filmed.images is not None
    steps = [0, 160, 161, 12_345, 25_649]
    with zarr.ZipStore(str(archive), mode="r") as store:
        state = zarr.open_group(store, mode="r")["data/state"][:]
        for step in steps:
            frame = zarr.open_group(store, mode="r")["data/img"][step]
            np.testing.assert_array_equal(filmed.images["image"][step], frame)
    np.testing.assert_array_equal(filmed.observations, state[:, :2])
    assert filmed.images["image"].shape == (25_650, 96, 96, 3)
    assert isinstance(filmed.images["image"], np.memmap)
    lowdim = np.load(shared_data("pusht/pusht_lowdim.npz"))
    for read in (PushT().load(), PushT(str(archive)).load()):
        np.testing.assert_array_equal(read.observations, state)
        np.testing.assert_array_equal(read.observations, lowdim["state"])
        np.testing.assert_array_equal(read.actions, lowdim["action"])
        np.testing.assert_array_equal(read.episode_ends, lowdim["episode_ends"])
        assert (read.source, read.sha256) == ("pusht", hashlib.sha256(archive.read_bytes()).hexdigest())
    assert sorted(path.name for path in home.iterdir()) == ["pusht.json", "pusht.npz", "pusht_images.npy"]
    provenance = json.loads((home / "pusht.json").read_text())
    assert provenance["source"] == "pusht"
    assert provenance["sha256"] == pusht.SHA256
    assert (provenance["episodes"], provenance["steps"]) == (206, 25_650)


def test_demonstrations_replay_in_the_environment() -> None:
    """State and action mean in gym-pusht what they meant when recorded."""
    data = PushT(str(shared_data(ARCHIVE))).load()
    env = make(PushT().environment)
    simulator: Any = env.unwrapped
    starts = [0, *data.episode_ends[:-1]]
    for start in starts[::40]:
        env.reset(seed=0)
        state = data.observations[start].astype(float)
        simulator.agent.position = list(state[:2])
        simulator.block.angle = state[4]  # turning also moves the block, so the angle comes first
        simulator.block.position = list(state[2:4])
        simulator.space.step(simulator.dt)
        for step in range(start, start + 20):
            observation, *_ = env.step(data.actions[step])
            np.testing.assert_allclose(observation, data.observations[step + 1], atol=1e-4)  # pixels of 512
    env.close()


def test_the_environment_shows_what_the_demonstrations_show() -> None:
    """The images of gym-pusht, at the recorded states, are the recorded ones but for a few pixels on edges."""
    archive = shared_data(ARCHIVE)
    states = PushT(str(archive)).load().observations.astype(float)
    env = make(PushT(images=True).environment)
    simulator: Any = env.unwrapped
    env.reset(seed=0)
    with zarr.ZipStore(str(archive), mode="r") as store:
        recorded = zarr.open_group(store, mode="r")["data/img"]
        for step in (0, 5000, 20_000):
            state = states[step]
            simulator.agent.position = list(state[:2])
            simulator.block.angle = state[4]
            simulator.block.position = list(state[2:4])
            observation, *_ = env.step(state[:2])  # pulled nowhere, the agent stays
            expected = recorded[step]
            shown = observation["images"]["image"]
            assert shown.dtype == np.uint8
            np.testing.assert_allclose(observation["state"], state[:2], atol=0.01)
            assert np.abs(shown - expected).mean() < 0.2  # of 255, most of it white
            assert np.abs(shown[..., ::-1] - expected).mean() > 0.8
            assert np.abs(shown.swapaxes(0, 1) - expected).mean() > 0.8
    env.close()


def test_the_protocol() -> None:
    spec = PushT().environment
    env = make(spec)
    assert (env.spec is not None and env.spec.max_episode_steps, spec.metric, spec.first_seed) == (
        300,
        "max_reward",
        100_000,
    )
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    assert env.observation_space.shape == (5,)
    env.close()


def test_the_protocol_with_images() -> None:
    """The same task: the same seed begins with the same state and earns the same for the same actions."""
    spec = PushT(images=True).environment
    assert spec.cameras == ("image",)
    env, state_env = make(spec), make(PushT().environment)
    assert (env.spec is not None and env.spec.max_episode_steps, spec.metric, spec.first_seed) == (
        300,
        "max_reward",
        100_000,
    )
    observation, _ = env.reset(seed=spec.first_seed)
    state, _ = state_env.reset(seed=spec.first_seed)
    for _ in range(5):
        assert env.observation_space.contains(observation)
        assert (sorted(observation), list(observation["images"])) == (["images", "state"], ["image"])
        assert observation["images"]["image"].shape == (96, 96, 3)
        np.testing.assert_allclose(observation["state"], state[:2], rtol=1e-6)
        action = state[2:4].astype(np.float32)  # towards the block
        observation, reward, *_ = env.step(action)
        state, reward_of_state, *_ = state_env.step(action)
        assert reward == pytest.approx(reward_of_state, rel=1e-9)  # gym-pusht sums areas in any order
    env.close(), state_env.close()


def test_images_of_an_archive(tmp_path: Path) -> None:
    """Registered, or read directly; and gone when an archive without them takes the place."""
    archive = small_archive(tmp_path / "filmed.zip", images_of(30))
    assert register(archive).images
    arrays: dict[str, Any] = {}
    images_of(30)(arrays)
    for source in (PushT(images=True), PushT(str(archive), images=True)):
        data = source.load()
        assert data.images is not None
        assert data.images["image"].dtype == np.uint8
        np.testing.assert_array_equal(data.images["image"], arrays["data/img"])
        np.testing.assert_array_equal(data.observations, PushT(str(archive)).load().observations[:, :2])
    for source in (PushT(), PushT(str(archive))):
        assert source.load().cameras == ()

    flat = small_archive(tmp_path / "flat.zip")
    assert not register(flat).images
    for source, where in ((PushT(images=True), "the registered copy"), (PushT(str(flat), images=True), "flat.zip")):
        with pytest.raises(UserError, match=f"{where} holds no images; run: dopr demos pusht"):
            source.load()


def test_a_damaged_copy_of_images(tmp_path: Path, home: Path) -> None:
    register(small_archive(tmp_path / "good.zip", images_of(30)))
    images = home / "pusht_images.npy"
    whole = images.read_bytes()
    for broken in (whole[:-1], whole[:50], b""):
        images.write_bytes(broken)
        with pytest.raises(UserError, match=r"damaged.*run again: dopr demos pusht"):
            PushT(images=True).load()
    assert PushT().load().num_episodes == 3


def test_another_set_of_the_same_kind_is_taken(tmp_path: Path) -> None:
    registered = register(small_archive(tmp_path / "small.zip"))
    assert (registered.episodes, registered.steps) == (3, 30)
    assert PushT().load().num_episodes == 3


def truncated(path: Path) -> None:
    whole = small_archive(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def flipped(path: Path) -> None:
    small_archive(path)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("data/state/2.0").header_offset + 60
    broken = bytearray(path.read_bytes())
    broken[place] ^= 0xFF
    path.write_bytes(bytes(broken))


def lacking_a_chunk(path: Path) -> None:
    whole = small_archive(path.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            if item != "data/action/1.0":
                new.writestr(item, old.read(item))


def pickled(path: Path) -> None:
    """Numbers, but encoded by a codec that unpickles."""
    whole = small_archive(path.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            text = old.read(item)
            if item == "data/action/.zarray":
                text = json.dumps(json.loads(text) | {"filters": [{"id": "pickle", "protocol": 5}]}).encode()
            new.writestr(item, text)


def changed(name: str, value: Any) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        small_archive(path, lambda arrays: arrays.update({name: value}))

    return build


def without_actions(path: Path) -> None:
    small_archive(path, lambda arrays: arrays.pop("data/action"))


def filmed(steps: int, value: float | None = None) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        small_archive(path, images_of(steps, value))

    return build


def not_finite(path: Path) -> None:
    def change(arrays: Any) -> None:
        arrays["data/action"][12, 1] = np.nan

    small_archive(path, change)


BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "no such file"),
    (lambda path: path.mkdir(), "a folder, not a file"),
    (lambda path: path.write_text("<html>quota exceeded</html>"), "not PushT's demonstrations"),
    (truncated, "not PushT's demonstrations"),
    (flipped, "not PushT's demonstrations"),
    (lacking_a_chunk, "lacks 1 of its chunks"),
    (without_actions, "no array 'data/action'"),
    (changed("data/state", np.zeros((30, 6), np.float32)), r"data/state has shape \(30, 6\)"),
    (changed("data/state", np.zeros(30, np.float32)), r"data/state has shape \(30,\)"),
    (changed("data/action", np.zeros((29, 2), np.float32)), "30 observations but 29 actions"),
    (changed("meta/episode_ends", np.array([10, 21, 31])), "episode ends"),
    (changed("data/action", np.full((30, 2), "a")), "not numbers"),
    (pickled, "encoded with .*pickle"),
    (not_finite, "actions hold NaN in episode 1, step 2"),
    (changed("data/img", np.zeros((30, 84, 84, 3), np.float32)), r"data/img has shape \(30, 84, 84, 3\), .* 96, 96, 3"),
    (filmed(29), "30 observations but 29 images"),
    (filmed(30, 0.5), "data/img holds values that are not whole numbers from 0 to 255"),
    (filmed(30, 256), "data/img holds values that are not whole numbers"),
    (filmed(30, -1), "data/img holds values that are not whole numbers"),
    (filmed(30, np.nan), "data/img holds values that are not whole numbers"),
]


@pytest.mark.parametrize(("build", "said"), BAD)
def test_bad_files_are_named_and_change_nothing(
    build: Callable[[Path], object], said: str, tmp_path: Path, home: Path
) -> None:
    register(small_archive(tmp_path / "good.zip"))
    before = contents(home)
    bad = tmp_path / "bad.zip"
    build(bad)
    with pytest.raises(UserError, match=said) as caught:
        register(bad)
    assert "\n" not in str(caught.value)
    assert contents(home) == before


def test_nothing_registered() -> None:
    with pytest.raises(UserError, match="run: dopr demos pusht"):
        PushT().load()


def test_a_damaged_copy(tmp_path: Path, home: Path) -> None:
    register(small_archive(tmp_path / "good.zip"))
    arrays = home / "pusht.npz"
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:500])
    with pytest.raises(UserError, match="run again: dopr demos pusht"):
        PushT().load()
    np.savez(arrays, observations=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"(?i)damaged.*allow_pickle"):
        PushT().load()


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: ClassVar[list[str | None]] = []
    breaks_off = False

    def do_GET(self) -> None:
        Handler.asked.append(self.headers["Range"])
        if not Handler.breaks_off:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:1000])

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An archive served on this machine, which the code believes to be the published one."""
    folder = tmp_path / "served"
    folder.mkdir()
    archive = small_archive(folder / "file.zip")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(pusht, "URL", f"http://127.0.0.1:{server.server_port}/file.zip")
    monkeypatch.setattr(pusht, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    yield archive
    server.shutdown()
    server.server_close()


def test_download(published: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demos", "pusht"]) == 0
    assert PushT().load().sha256 == hashlib.sha256(published.read_bytes()).hexdigest()
    assert PushT().load().num_episodes == 3
    assert sorted(contents(home)) == ["pusht.json", "pusht.npz"]
    out, err = capsys.readouterr()
    assert out.startswith("pusht: 3 episodes, 30 steps, registered in ")
    assert "pusht ━" in err


def test_an_interrupted_download_goes_on(published: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "breaks_off", True)
    with pytest.raises(
        UserError, match=r"ended after 1000 of \d+ bytes.* are kept; run it again to go on, or fetch pu"
    ):
        register()
    monkeypatch.setattr(Handler, "breaks_off", False)
    register()
    assert Handler.asked[-2:] == [None, "bytes=1000-"]
    assert sorted(contents(home)) == ["pusht.json", "pusht.npz"]


def wrong(archive: Path) -> None:
    small_archive(archive, lambda arrays: arrays.update({"data/action": np.ones((30, 2), np.float32)}))


def cut(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:1000])


def gone(archive: Path) -> None:
    archive.unlink()


@pytest.mark.parametrize(("spoil", "said"), [(wrong, "gave a file with SHA-256"), (cut, "with SHA-256"), (gone, "404")])
def test_failed_downloads_change_nothing(
    spoil: Callable[[Path], None], said: str, published: Path, home: Path, tmp_path: Path
) -> None:
    register(Path(shutil.copy(published, tmp_path / "copy.zip")))
    before = contents(home)
    spoil(published)
    with pytest.raises(UserError, match=rf"{said}.*dopr demos pusht --path FILE"):
        register()
    assert contents(home) == before


def test_connection_refused(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(pusht, "URL", "http://127.0.0.1:9/file.zip")
    with pytest.raises(UserError, match="dopr demos pusht --path FILE"):
        register()
    assert contents(home) == {}
