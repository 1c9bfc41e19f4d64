"""The LightningModule with cameras: crops, encoding once per chunk, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from dopr_lightning import DoPr
from dopr_lightning.data import Demonstrations, EnvironmentSpec, PushT, Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError
from dopr_lightning.policies.algorithms import Algorithm, Diffusion, FlowMatching, Regression
from dopr_lightning.policies.module import OptimizerConfig, PolicyModule
from dopr_lightning.policies.networks import ResidualMLP, VisionMLP, VisionTransformer, VisionUnet1d
from dopr_lightning.rollout.environments import make
from dopr_lightning.rollout.evaluate import evaluate

CAMERA = "front"
SIDE, CROP = 36, 32  # smaller ones shrink to one pixel, in which group norms see no variance
NETWORK = partial(VisionMLP, cameras=[CAMERA], encoder_width=8, crop=CROP, width=8, depth=1)


class Filmed(Source):
    """Six episodes of twelve steps. How much of the scene is lit says what to do; the state says nothing.

    Args:
        cameras: All of which see the same.
    """

    def __init__(self, cameras: tuple[str, ...] = (CAMERA,)) -> None:
        self.names = cameras

    @property
    def environment(self) -> EnvironmentSpec:
        return EnvironmentSpec("Nowhere-v0", 10, "return", cameras=self.names)

    def load(self) -> Demonstrations:
        rng = np.random.default_rng(0)
        turn = rng.permutation(6)[:, None] + np.arange(12) / 12  # steps of 1/12, each value seen once
        share = ((turn + 1) / 8).ravel()
        frames = rng.uniform(0, 50, (72, SIDE, SIDE, 3))
        for frame, part in zip(frames, share, strict=True):
            frame[:, : round(part * SIDE)] += 180
        images = dict.fromkeys(self.names, frames.astype(np.uint8))
        state, action = rng.uniform(-3, 5, (72, 2)), 20 * share[:, None]
        return Demonstrations(state, action, np.arange(12, 73, 12), "filmed", "abc", images)  # type: ignore[arg-type]


def data(*cameras: str, batch_size: int = 11) -> DemonstrationData:
    return DemonstrationData(Filmed(cameras or (CAMERA,)), batch_size=batch_size, observe=2, horizon=4, act=2)


def policy(algorithm: Algorithm | None = None, **options: Any) -> PolicyModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"observation_dim": 2, "action_dim": 1, "observe": 2, "horizon": 4, "act": 2}
    settings |= {"network": NETWORK, "optimizer": OptimizerConfig(lr=1e-2)} | options
    return PolicyModule(algorithm=algorithm or Regression(), **settings)


def fitted(module: PolicyModule) -> PolicyModule:
    statistics = data().statistics()
    module.observation_normalizer.fit(statistics["observation"])
    module.action_normalizer.fit(statistics["action"])
    return module


def trainer(folder: Path, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(settings | options))


class Watched(VisionMLP):
    """Notes the first number that each encoding's generator would give, and the images it is handed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, cameras=[CAMERA], encoder_width=8, crop=CROP, width=8, depth=1)
        self.seen: dict[bool, list[float | None]] = {True: [], False: []}
        self.forwards = 0

    def encode(self, observation: Any, generator: torch.Generator | None = None) -> Tensor:
        assert observation["images"][CAMERA].dtype == torch.uint8
        first = None
        if generator is not None:
            first = torch.rand((), generator=torch.Generator().set_state(generator.get_state())).item()
        self.seen[self.training].append(first)
        return super().encode(observation, generator)

    def forward(self, *args: Any) -> Tensor:
        self.forwards += 1
        return super().forward(*args)


class Noise:
    """Regression that notes the first number of each training loss's generator."""

    denoises = False

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def loss(self, network: Any, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        if network.training:
            self.drawn.append(torch.rand((), generator=generator).item())
        return Regression().loss(network, observation, action, generator)

    def sample(self, network: Any, observation: Tensor, shape: Any, generators: Any) -> Tensor:
        raise AssertionError


def draws(folder: Path, seed: int = 0) -> tuple[list[Any], list[Any], list[float]]:
    """Of a run of ten steps: what crops are drawn from in training and in validation, and training noise."""
    algorithm = Noise()
    module = policy(algorithm, network=Watched, seed=seed)
    torch.seed()  # the global generator must not matter
    trainer(folder).fit(module, datamodule=data())
    watched: Any = module.network
    return watched.seen[True], watched.seen[False], algorithm.drawn


def test_crops_are_new_at_every_step_and_central_in_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, validation, noise = draws(tmp_path)
    assert len(training) == len(set(training)) == 10
    assert None not in training
    assert validation == [None] * 2
    assert not set(training) & set(noise)  # a stream of their own

    assert draws(tmp_path) == (training, validation, noise)
    assert not set(draws(tmp_path, seed=1)[0]) & set(training)
    monkeypatch.setattr(PolicyModule, "global_rank", property(lambda self: 1))
    assert not set(draws(tmp_path)[0]) & set(training)


def test_noise_is_what_it_is_without_cameras(tmp_path: Path) -> None:
    """A batch's noise is a function of (seed, rank, step, batch) as it always was: images do not shift it."""
    _, _, noise = draws(tmp_path, seed=3)
    expected = []
    for step in range(10):
        words = np.random.SeedSequence((0, 3, 0, step, step % 5)).generate_state(1, np.uint64)
        expected.append(torch.rand((), generator=torch.Generator().manual_seed(int(words[0]))).item())
    assert noise == expected


def losses(folder: Path, max_epochs: int) -> dict[str, list[float]]:
    """Of a network that as good as stays as it is: what differs is what it is shown."""
    found: dict[str, list[float]] = {"training": [], "validation": []}

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            found["training"].append(outputs["loss"].item())

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            found["validation"].append(trainer.callback_metrics["val/loss"].item())

    module = policy(optimizer=OptimizerConfig(base="sgd", lr=1e-30, schedule="constant"))
    run = trainer(folder, max_epochs=max_epochs, callbacks=[Note()])
    run.fit(module, datamodule=data(batch_size=55))
    return found


def test_the_same_frames_are_cropped_anew_at_every_step_and_again_alike(tmp_path: Path) -> None:
    """Every epoch is one batch of all windows, so only crops change the training loss."""
    found = losses(tmp_path, 4)
    assert len({round(loss, 6) for loss in found["training"]}) == 4
    assert len(set(found["validation"])) == 1
    assert losses(tmp_path, 4) == found


@pytest.mark.parametrize(
    ("algorithm", "forwards"),
    [(FlowMatching(steps=5), 5), (Diffusion(train_steps=20, sample_steps=20), 20), (Regression(), 1)],
    ids=["flow", "diffusion", "regression"],
)
def test_a_chunk_is_one_encoding(algorithm: Algorithm, forwards: int) -> None:
    module = fitted(policy(algorithm, network=Watched)).eval()
    batch = next(iter(data().val_dataloader()))
    generators = [torch.Generator().manual_seed(i) for i in range(11)]
    observation = {"state": batch["observation"], "images": batch["images"]}
    actions = module.predict(observation, generators)  # type: ignore[arg-type]
    watched: Any = module.network
    assert watched.seen == {True: [], False: [None]}
    assert watched.forwards == forwards
    assert actions.shape == (11, 2, 1)
    assert not actions.requires_grad


def test_predict_normalises_the_state_alone() -> None:
    module = fitted(policy()).eval()
    batch = next(iter(data().val_dataloader()))
    observation: Any = {"state": batch["observation"], "images": batch["images"]}
    with torch.no_grad():
        state = module.observation_normalizer(batch["observation"])
        seen = module.network.encode({"state": state, "images": batch["images"]})
        expected = module.action_normalizer.inverse(module.network(None, None, seen))[:, 1:3]
    assert torch.equal(module.predict(observation, [torch.Generator()] * 11), expected)


def test_what_only_the_camera_sees_is_learnt(tmp_path: Path) -> None:
    """With DoPr, whose layers are all the encoder's convolutions; blind, the mean action would be the best."""
    module = policy(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=5))
    dopr = DoPr(damping=0.1, update_every=4)
    covered: set[str] = set()

    class Note(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            [preconditioner] = dopr.preconditioners
            assert preconditioner is not None
            covered.update(row.parameter for row in preconditioner.summary() if row.covered)

    run = trainer(tmp_path, max_epochs=24, callbacks=[dopr, Note()])
    run.fit(module, datamodule=data())
    trained, held_out = (
        module.action_normalizer(torch.cat([batch["action"] for batch in loader]))
        for loader in (data().train_dataloader(), data().val_dataloader())
    )
    blind = (held_out - trained.mean()).square().mean()
    assert run.callback_metrics["val/loss"] < blind / 4
    convolutions = {
        f"network.{name}.weight" for name, m in module.network.named_modules() if isinstance(m, torch.nn.Conv2d)
    }
    assert len(convolutions) == 20
    assert convolutions < covered

    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PolicyModule.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, network=NETWORK, algorithm=Regression()
    )
    batch = next(iter(data().val_dataloader()))
    observation: Any = {"state": batch["observation"], "images": batch["images"]}
    generators = [torch.Generator()] * 11
    assert torch.equal(again.eval().predict(observation, generators), module.eval().predict(observation, generators))


def test_episodes_of_pusht_from_images() -> None:
    """The environment's observations are the policy's: also through batches and processes of evaluate()."""
    network = partial(VisionMLP, cameras=["image"], encoder_width=8, crop=84, width=8, depth=1)
    module = policy(network=network, action_dim=2).eval()
    ends = {"min": torch.zeros(2), "max": torch.full((2,), 512.0)}
    module.observation_normalizer.fit(ends)
    module.action_normalizer.fit(ends)
    spec = replace(PushT(images=True).environment, max_steps=5)
    together = evaluate(module, spec, [7, 8], num_envs=2)
    for seed, episode in zip((7, 8), together, strict=True):
        assert episode.length == 5
        env = make(spec)
        observation, _ = env.reset(seed=seed)
        window: Any = {
            "state": torch.from_numpy(observation["state"]).expand(1, 2, 2),
            "images": {
                "image": torch.from_numpy(observation["images"]["image"]).permute(2, 0, 1).expand(1, 2, 3, 96, 96)
            },
        }
        expected = module.predict(window, [torch.Generator()])[0]
        torch.testing.assert_close(torch.from_numpy(episode.actions[:2]), expected, rtol=1e-4, atol=1e-2)
        env.close()
    assert not np.allclose(together[0].actions[:2], together[1].actions[:2], atol=0.1)


@pytest.mark.parametrize(
    "network",
    [
        partial(VisionUnet1d, channels=(8, 16), groups=4, kernel_size=3, condition_dim=8),
        partial(VisionTransformer, width=16, depth=1, heads=2),
    ],
    ids=["unet", "transformer"],
)
def test_other_networks_train(tmp_path: Path, network: Callable[..., Any]) -> None:
    module = policy(
        FlowMatching(steps=2), network=partial(network, cameras=["b", "a"], encoder_width=8, crop=CROP), seed=1
    )
    before = {name: value.clone() for name, value in module.network.named_parameters()}
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data("a", "b"))
    for name, value in module.network.named_parameters():
        assert value.isfinite().all()
        if name.startswith(("cameras", "projections")):
            assert not torch.equal(value, before[name]), name


CAMERAS: list[tuple[Any, tuple[str, ...], str]] = [
    (NETWORK, ("side", "top"), "VisionMLP needs camera 'front', and the data has side, top; set the network's cameras"),
    (partial(ResidualMLP, width=8, depth=1), ("side", "top"), "ResidualMLP sees no images, .* those of side, top; use"),
]


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize(("network", "cameras", "said"), CAMERAS)
def test_data_of_other_cameras(tmp_path: Path, network: Any, cameras: tuple[str, ...], said: str, verb: str) -> None:
    with pytest.raises(UserError, match=said):
        getattr(trainer(tmp_path), verb)(policy(network=network), datamodule=data(*cameras))


def test_data_without_images(tmp_path: Path) -> None:
    module = DemonstrationData(Filmed(()), batch_size=11, observe=2, horizon=4, act=2)
    with pytest.raises(UserError, match="VisionMLP needs camera 'front', and the data has no images"):
        trainer(tmp_path).fit(policy(), datamodule=module)


def test_only_some_of_the_data_s_cameras_may_be_used(tmp_path: Path) -> None:
    trainer(tmp_path, max_epochs=1).fit(policy(), datamodule=data("side", CAMERA))


def test_integers_need_no_look_for_nan_and_floats_get_one() -> None:
    batch: Any = {"observation": torch.zeros(6, 2, 2), "action": torch.zeros(6, 4, 1)}
    batch["images"] = {CAMERA: torch.zeros(6, 2, 3, 12, 12, dtype=torch.uint8), "other": torch.zeros(6, 2, 3, 12, 12)}
    assert policy().on_before_batch_transfer(batch, 0) is batch
    batch["images"]["other"][4, 1, 0, 3, 3] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity: 'other', window 4"):
        policy().on_before_batch_transfer(batch, 0)
