"""How many samples per second reach the training loop? Our loader beside robomimic's and Diffusion Policy's way.

All three serve the same random demonstrations, written to a temporary folder: as robomimic's HDF5 file, and as arrays
(the images memory-mapped). They take turns in one process, for a moment each, in an order that rotates, so that what
disturbs one disturbs the others; the table has medians over the rounds, and quartiles, of rates and of ratios.

    python benchmarks/data_loading.py

Everything read is in the page cache after the first round: this is the cost of cutting, copying and collating, not of a
disk. A sample is a window of `OBSERVE` observations and `HORIZON` actions, batched and shuffled.

* `dopr`: `DemonstrationData`; one gather per batch and array. Images stay uint8, which the network scales.
* `robomimic`: its `SequenceDataset` and the default collate. As its own training does, it keeps everything in memory
  for low-dim (`hdf5_cache_mode="all"`), all but the images for images (`"low_dim"`). It reads an image for every action
  of a window, there being no other way to ask; images stay uint8.
* `diffusion_policy`: one sample after the other cut from arrays in memory, padded, made into tensors, default collate;
  images only for the observed steps, as its robomimic image data set does, which also makes them float32 in [0, 1]
  here, on the CPU. "uint8" leaves that to the network, to show what the rest costs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.versions import versions

OBSERVE, HORIZON, ACT = 2, 16, 8
KEYS = {"object": 10, "robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
ACTION = 10
SIZE = 84
SEED = 0

Arrays = Mapping[str, np.ndarray]


class Made(Source):
    """Demonstrations that exist already."""

    def __init__(self, demonstrations: Demonstrations) -> None:
        self.demonstrations = demonstrations

    @property
    def environment(self) -> EnvironmentSpec:
        raise NotImplementedError

    def load(self) -> Demonstrations:
        return self.demonstrations


def make(folder: Path, episodes: int, steps: int, cameras: tuple[str, ...]) -> tuple[Demonstrations, Path]:
    """The same demonstrations as arrays and as robomimic's file."""
    rng = np.random.default_rng(SEED)
    total = episodes * steps
    seen = {key: rng.normal(size=(total, size)).astype(np.float32) for key, size in KEYS.items()}
    actions = rng.uniform(-1, 1, (total, ACTION)).astype(np.float32)
    images = {}
    for camera in cameras:
        file = folder / f"{camera}.npy"
        np.save(file, rng.integers(0, 256, (total, SIZE, SIZE, 3), dtype=np.uint8))
        images[camera] = np.load(file, mmap_mode="r")
    path = folder / f"{'image' if cameras else 'low_dim'}.hdf5"
    with h5py.File(path, "w") as hdf5:
        data = hdf5.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})
        for episode in range(episodes):
            part = slice(episode * steps, (episode + 1) * steps)
            demo = data.create_group(f"demo_{episode}")
            demo.attrs["num_samples"] = steps
            demo["actions"] = actions[part]
            for key, array in (seen | images).items():
                demo[f"obs/{key}"] = array[part]
    ends = np.arange(steps, total + 1, steps)
    return Demonstrations(np.concatenate([*seen.values()], axis=1), actions, ends, "made", images=images or None), path


class Sliced(Dataset[Any]):
    """Diffusion Policy's way: from episodes end to end in memory, one padded slice per sample."""

    def __init__(self, data: Demonstrations, floats: bool) -> None:
        self.arrays = {"observation": data.observations, "action": data.actions}
        self.images = {camera: np.array(array) for camera, array in (data.images or {}).items()}
        self.floats = floats
        self.windows = []
        begin = 0
        for end in data.episode_ends:
            for start in range(begin - (OBSERVE - 1), end + (ACT - 1) - HORIZON + 1):
                self.windows.append((start, begin, end))
            begin = end

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Any:
        sample: dict[str, Any] = {
            name: torch.from_numpy(self.cut(array, index, OBSERVE if name == "observation" else HORIZON))
            for name, array in self.arrays.items()
        }
        if self.images:
            sample["images"] = {camera: self.frames(array, index) for camera, array in self.images.items()}
        return sample

    def frames(self, array: np.ndarray, index: int) -> torch.Tensor:
        frames = np.moveaxis(self.cut(array, index, OBSERVE), -1, 1)
        return torch.from_numpy(frames.astype(np.float32) / 255 if self.floats else frames)

    def cut(self, array: np.ndarray, index: int, length: int) -> np.ndarray:
        start, begin, end = self.windows[index]
        inside = array[max(start, begin) : min(start + length, end)]
        before, after = max(begin - start, 0), max(start + length - end, 0)
        if not before and not after:
            return inside
        padded = np.empty((length, *array.shape[1:]), array.dtype)
        padded[:before], padded[length - after :] = inside[0], inside[-1]
        padded[before : length - after] = inside
        return padded


def robomimic(path: Path, data: Demonstrations) -> Dataset[Any]:
    from robomimic.utils import obs_utils
    from robomimic.utils.dataset import SequenceDataset

    cameras = list(data.cameras)
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(KEYS), "rgb": cameras}})
        return SequenceDataset(
            str(path),
            obs_keys=[*KEYS, *cameras],
            dataset_keys=("actions",),
            frame_stack=OBSERVE,
            seq_length=HORIZON - OBSERVE + 1,
            hdf5_cache_mode="low_dim" if cameras else "all",
            hdf5_use_swmr=False,
            load_next_obs=False,
        )


def loaders(data: Demonstrations, path: Path, batch_size: int, workers: int) -> dict[str, Callable[[], Any]]:
    """What starts a pass over the data, by name."""
    module = DemonstrationData(Made(data), batch_size, OBSERVE, HORIZON, ACT, num_workers=workers)

    def default(dataset: Dataset[Any]) -> DataLoader[Any]:
        options: Any = {"num_workers": workers, "persistent_workers": workers > 0}
        return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, **options)

    found = {"dopr": module.train_dataloader(), "robomimic": default(robomimic(path, data))}
    found["diffusion_policy"] = default(Sliced(data, floats=True))
    if data.cameras:
        found["diffusion_policy, uint8"] = default(Sliced(data, floats=False))
    check(module, Sliced(data, floats=False))
    return {name: loader.__iter__ for name, loader in found.items()}


def check(module: DemonstrationData, theirs: Sliced) -> None:
    """Ours and Diffusion Policy's samples are the same, as far as ours go: it holds an episode out."""
    known = {tuple(sample["action"].ravel().tolist()): sample for sample in (theirs[i] for i in range(0, 600))}
    found = 0
    for ours in module.train_dataloader():
        for row, action in enumerate(ours["action"]):
            sample = known.get(tuple(action.ravel().tolist()))
            if sample is not None:
                found += 1
                assert torch.equal(ours["observation"][row], sample["observation"])
                for camera, frames in ours.get("images", {}).items():
                    assert torch.equal(frames[row], sample["images"][camera])
    assert found > 100, found


def rates(
    starts: Mapping[str, Callable[[], Any]], batch_size: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Samples per second of each loader in each round."""
    endless = {name: forever(start) for name, start in starts.items()}
    found: dict[str, list[float]] = {name: [] for name in starts}
    names = list(starts)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            next(endless[name])
            begun, batches = time.perf_counter(), 0
            while time.perf_counter() - begun < seconds:
                next(endless[name])
                batches += 1
            if turn:  # the first warms up
                found[name].append(batches * batch_size / (time.perf_counter() - begun))
    return found


def forever(start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    while True:
        yield from start()


def table(title: str, found: Mapping[str, list[float]]) -> str:
    """Medians and quartiles; of the ratio those of each round's, in which both met the same disturbance."""
    lines = [title, "", "| loader | samples/s | dopr's over it |", "| --- | ---: | ---: |"]
    for name, values in found.items():
        ratios = [ours / theirs for ours, theirs in zip(found["dopr"], values, strict=True)]
        lines.append(f"| {name} | {spread(values, ',.0f')} | {spread(ratios, '.1f') if name != 'dopr' else ''} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in statistics.quantiles(values, n=4))
    return f"{middle} ({low} .. {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of each loader in each round (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150, help="per episode (default: %(default)s)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    torch.set_num_threads(1)

    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{options.episodes} episodes of {options.steps} steps, {options.workers} loader processes\n", flush=True)
    for cameras, batch_size in (((), 256), (("agentview_image", "robot0_eye_in_hand_image"), 64)):
        with tempfile.TemporaryDirectory() as folder:
            data, path = make(Path(folder), options.episodes, options.steps, cameras)
            starts = loaders(data, path, batch_size, options.workers)
            found = rates(starts, batch_size, options.rounds, options.seconds)
        seen = f"{len(cameras)} cameras of {SIZE} x {SIZE}" if cameras else f"{sum(KEYS.values())} numbers"
        print(table(f"{seen}, batches of {batch_size}", found), flush=True)


if __name__ == "__main__":
    main()
