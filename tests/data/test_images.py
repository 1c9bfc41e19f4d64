"""Images on their way from demonstrations to batches."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.data.windows import WindowDataset, already_batched
from dopr_lightning.errors import UserError

LENGTHS = [9, 12, 8, 15]
STEPS = sum(LENGTHS)


def frames(seed: int, height: int = 4, width: int = 5) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (STEPS, height, width, 3), dtype=np.uint8)


def demonstrations(**images: Any) -> Demonstrations:
    """Step i observes (i,) and what its cameras' i-th frames show."""
    rows = np.arange(STEPS, dtype=np.float32)[:, None]
    return Demonstrations(rows, -rows, np.cumsum(LENGTHS), "toy", "abc", images or None)


def two_cameras() -> Demonstrations:
    return demonstrations(front=frames(1), wrist=frames(2, height=6))


class Filmed(Source):
    def __init__(self, data: Demonstrations | None = None) -> None:
        self.data = data or two_cameras()

    @property
    def environment(self) -> EnvironmentSpec:
        return EnvironmentSpec("Nowhere-v0", 10, "return", cameras=self.data.cameras)

    def load(self) -> Demonstrations:
        return self.data


def padded(episode: Any, before: int, after: int) -> Any:
    return np.concatenate([episode[:1].repeat(before, 0), episode, episode[-1:].repeat(after, 0)])


def brute_force(images: Any, observe: int, horizon: int, act: int) -> Any:
    """Pad each episode explicitly, then slide a window over it and keep the frames that are observed."""
    windows = []
    for episode in np.split(images, np.cumsum(LENGTHS)[:-1]):
        long = padded(episode, observe - 1, act - 1)
        windows += [long[begin : begin + observe] for begin in range(len(long) - horizon + 1)]
    return np.stack(windows).transpose(0, 1, 4, 2, 3)


@pytest.mark.parametrize(("observe", "horizon", "act"), [(2, 8, 4), (1, 1, 1), (3, 5, 3), (4, 6, 2)])
def test_windows_equal_a_loop_over_padded_episodes(observe: int, horizon: int, act: int) -> None:
    data = two_cameras()
    dataset = WindowDataset(data, observe, horizon, act)
    batch = dataset.__getitems__(range(len(dataset)))
    assert sorted(batch["images"]) == ["front", "wrist"]
    for camera, seed, height in (("front", 1, 4), ("wrist", 2, 6)):
        expected = brute_force(frames(seed, height), observe, horizon, act)
        assert batch["images"][camera].dtype == torch.uint8
        np.testing.assert_array_equal(batch["images"][camera], expected)
        np.testing.assert_array_equal(dataset[len(dataset) - 1]["images"][camera], expected[-1])


def test_images_change_nothing_else() -> None:
    arguments = {"observe": 2, "horizon": 8, "act": 4}
    flat, filmed = WindowDataset(demonstrations(), **arguments), WindowDataset(two_cameras(), **arguments)
    assert set(flat[3]) == {"observation", "action"}
    for name in ("observation", "action"):
        assert torch.equal(flat.__getitems__(range(len(flat)))[name], filmed.__getitems__(range(len(filmed)))[name])


def test_a_part_s_images_are_those_of_its_steps_and_shared_with_the_whole() -> None:
    whole = two_cameras()
    parts = [*whole.split(2, seed=4), whole.take(3), whole.split(1, seed=1)[0].take(2).split(1, seed=0)[1]]
    assert whole.images is not None
    for part in parts:
        assert part.num_episodes < whole.num_episodes
        assert part.images is not None
        assert all(part.images[camera] is whole.images[camera] for camera in ("front", "wrist"))
        dataset = WindowDataset(part, observe=2, horizon=5, act=4)
        batch = dataset.__getitems__(range(len(dataset)))
        steps = batch["observation"][..., 0].long().numpy()
        assert set(steps.ravel()) == set(part.observations[:, 0].astype(int))
        for camera, array in whole.images.items():
            np.testing.assert_array_equal(batch["images"][camera], array[steps].transpose(0, 1, 4, 2, 3))


@pytest.fixture
def on_disk(tmp_path: Path) -> Any:
    np.save(tmp_path / "frames.npy", frames(3, 64, 64))
    return np.load(tmp_path / "frames.npy", mmap_mode="r")


def test_frames_on_disk_stay_there(on_disk: Any) -> None:
    """A loader process, which may get its dataset pickled, opens the file for itself."""
    dataset = WindowDataset(demonstrations(front=on_disk).take(3), 2, 8, 4)
    sent = pickle.dumps(dataset)
    assert len(sent) < on_disk.nbytes / 10
    again = pickle.loads(sent)
    assert torch.equal(
        again.__getitems__(range(len(again)))["images"]["front"],
        dataset.__getitems__(range(len(dataset)))["images"]["front"],
    )


def test_a_file_in_fortrans_order(on_disk: Any) -> None:
    np.save(on_disk.filename, np.asfortranarray(on_disk))
    dataset = WindowDataset(demonstrations(front=np.load(on_disk.filename, mmap_mode="r")), 1, 1, 1)
    sent = pickle.dumps(dataset)
    assert len(sent) < on_disk.nbytes / 10
    expected = frames(3, 64, 64)[5].transpose(2, 0, 1)
    for one in (dataset, pickle.loads(sent)):
        np.testing.assert_array_equal(one[5]["images"]["front"][0], expected)


@pytest.mark.parametrize("view", [lambda a: np.moveaxis(a, 1, -1), lambda a: a.transpose(0, 2, 3, 1)[:, ::-1, :, ::-1]])
def test_a_view_of_a_file_is_not_read_whole_for_a_batch(view: Callable[[Any], Any], tmp_path: Path) -> None:
    """Colours first in the file; upside down, and blue first."""
    np.save(tmp_path / "frames.npy", frames(3, 64, 64).transpose(0, 3, 1, 2))
    images = view(np.load(tmp_path / "frames.npy", mmap_mode="r"))
    dataset = WindowDataset(demonstrations(front=images), 1, 1, 1)
    tracemalloc.start()
    batch = dataset.__getitems__([5, 7])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < images.nbytes / 4
    np.testing.assert_array_equal(batch["images"]["front"][:, 0], images[[5, 7]].transpose(0, 3, 1, 2))


def test_a_part_of_a_file_is_sent_as_it_is(on_disk: Any) -> None:
    """Its offset in the file is not what numpy says."""
    later = np.concatenate([np.zeros((1, 1, 64, 64, 3), np.uint8)[0], on_disk[:-1]])
    np.save(on_disk.filename, np.concatenate([later[:1], on_disk]))
    part = np.load(on_disk.filename, mmap_mode="r")[1:]
    dataset = pickle.loads(pickle.dumps(WindowDataset(demonstrations(front=part), 1, 1, 1)))
    expected = frames(3, 64, 64)[5].transpose(2, 0, 1)
    np.testing.assert_array_equal(dataset[5]["images"]["front"][0], expected)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_processes_give_the_same_batches(on_disk: Any, context: str) -> None:
    dataset = WindowDataset(demonstrations(front=on_disk), 2, 8, 4)
    arguments: Any = {"batch_size": 20, "collate_fn": already_batched}
    here = list(DataLoader(dataset, **arguments))
    there = list(DataLoader(dataset, num_workers=1, multiprocessing_context=context, **arguments))
    assert len(here) == len(there) == 2
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a["images"]["front"], b["images"]["front"])
        assert torch.equal(a["action"], b["action"])


def test_the_data_module_s_batches_and_cameras() -> None:
    data = DemonstrationData(Filmed(), batch_size=6, observe=2, horizon=4, act=3)
    assert data.cameras == ("front", "wrist")
    assert DemonstrationData(Filmed(demonstrations())).cameras == ()
    assert (data.observation_dim, data.action_dim) == (1, 1)
    assert set(data.statistics()) == {"observation", "action"}  # images the network scales itself
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            steps = batch["observation"][..., 0].long().numpy()
            assert batch["images"]["wrist"].shape == (len(steps), 2, 3, 6, 5)
            np.testing.assert_array_equal(batch["images"]["front"], frames(1)[steps].transpose(0, 1, 4, 2, 3))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_for_a_gpu(device: str) -> None:
    data = DemonstrationData(Filmed(), batch_size=6)
    assert not data.val_dataloader().pin_memory
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = SimpleNamespace(
        root_device=torch.device(device), world_size=1, global_rank=0
    )  # type: ignore[assignment]
    data.trainer = trainer
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.pin_memory == (device == "cuda")


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: frames(1).astype(np.float32), r"'front' are float32 of shape \(44, 4, 5, 3\); expected uint8"),
    (lambda: frames(1)[..., 0], r"'front' are uint8 of shape \(44, 4, 5\)"),
    (lambda: frames(1).transpose(0, 3, 1, 2), r"'front' are uint8 of shape \(44, 3, 4, 5\)"),
    (lambda: frames(1)[:-1], "44 observations but 43 images of camera 'front'; give one image per observation"),
]


@pytest.mark.parametrize(("build", "said"), BAD)
def test_images_must_fit(build: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=f"'toy': .*{said}") as caught:
        demonstrations(front=build())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [np.arange(43), np.arange(44) + 1, np.arange(44) - 1, np.zeros((44, 1))])
def test_image_rows_must_be_there(rows: Any) -> None:
    whole = two_cameras()
    with pytest.raises(UserError, match="44 observations and 44 images; give each observation a row that is there"):
        Demonstrations(
            whole.observations, whole.actions, whole.episode_ends, "toy", "abc", whole.images, image_rows=rows
        )
