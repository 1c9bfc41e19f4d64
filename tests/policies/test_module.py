"""The LightningModule: its noise, its actions, its checkpoints, and what it refuses."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from toy_task import ToyTask, train

from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError
from dopr_lightning.policies.algorithms import Algorithm, FlowMatching, Regression
from dopr_lightning.policies.module import OptimizerConfig, PolicyModule
from dopr_lightning.policies.networks import ActionNetwork, ResidualMLP

OPTIMIZER = OptimizerConfig(lr=1e-2)


def policy(algorithm: Algorithm | None = None, **options: Any) -> PolicyModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"observation_dim": 2, "action_dim": 1, "observe": 2, "horizon": 4, "act": 2}
    settings |= {"network": partial(ResidualMLP, width=8, depth=1), "optimizer": OPTIMIZER} | options
    return PolicyModule(algorithm=algorithm or Regression(), **settings)


def data(batch_size: int = 11) -> DemonstrationData:
    """55 training windows, 11 held out."""
    return DemonstrationData(ToyTask(), batch_size=batch_size, observe=2, horizon=4, act=2)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "callbacks": list(callbacks),
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(settings | options))


class Draws:
    """An algorithm that notes the noise it is given, by whether it is training."""

    denoises = False

    def __init__(self) -> None:
        self.seen: dict[bool, list[float]] = {True: [], False: []}

    def loss(self, network: ActionNetwork, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        self.seen[network.training].append(torch.rand((), generator=generator).item())
        return network(None, None, observation).square().mean()

    def sample(self, network: Any, observation: Tensor, shape: Any, generators: Any) -> Tensor:
        return torch.zeros(shape)


def draws(folder: Path, seed: int = 0, **options: Any) -> tuple[list[float], list[float]]:
    """Of training and of validation."""
    algorithm = Draws()
    torch.seed()  # the global generator must not matter
    trainer(folder, **options).fit(policy(algorithm, seed=seed), datamodule=data(4))
    return algorithm.seen[True], algorithm.seen[False]


def test_noise_is_new_at_every_step_and_the_same_at_every_validation(tmp_path: Path) -> None:
    training, validation = draws(tmp_path)
    assert len(training) == 26
    assert len(set(training)) == 26
    assert len(validation) == 6
    assert validation[:3] == validation[3:]
    assert len(set(validation[:3])) == 3  # three batches, three noises
    assert not set(training) & set(validation)

    assert draws(tmp_path) == (training, validation)
    others, same = draws(tmp_path, seed=1)
    assert not set(others) & set(training)
    assert same == validation  # so that the validation losses of several seeds are about the same


def test_accumulated_batches_have_noise_of_their_own(tmp_path: Path) -> None:
    training, _ = draws(tmp_path, accumulate_grad_batches=5, max_epochs=1)
    assert len(training) == 13  # in three steps
    assert len(set(training)) == 13


def test_every_rank_has_noise_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draws(tmp_path)
    monkeypatch.setattr(PolicyModule, "global_rank", property(lambda self: 1))
    second = draws(tmp_path)
    assert not set(first[0]) & set(second[0])
    assert not set(first[1]) & set(second[1])


class Stub(ActionNetwork):
    """A chunk that says of each action which it is: 100 t + 10 a + the sum of what was seen."""

    def compute(self, action: Tensor | None, time: Tensor | None, observation: Tensor) -> Tensor:
        t = torch.arange(self.horizon)[:, None]
        a = torch.arange(self.action_dim)
        return observation.sum((1, 2))[:, None, None] + 100 * t + 10 * a

    def parameter_roles(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("observe", "horizon", "act"), [(1, 3, 3), (2, 8, 4), (3, 4, 2)])
def test_predict_inverts_the_normaliser_and_starts_at_the_present(observe: int, horizon: int, act: int) -> None:
    module = policy(network=Stub, action_dim=3, observe=observe, horizon=horizon, act=act)
    low, high = np.array([-1.0, 2.0]), np.array([3.0, 10.0])
    lowest, highest = np.array([0.0, -4.0, 5.0]), np.array([8.0, 0.0, 6.0])
    for normalizer, ends in (
        (module.observation_normalizer, (low, high)),
        (module.action_normalizer, (lowest, highest)),
    ):
        normalizer.fit(
            {name: torch.tensor(end, dtype=torch.float32) for name, end in zip(("min", "max"), ends, strict=True)}
        )

    seen = np.random.default_rng(0).uniform(low, high, (5, observe, 2))
    actions = module.predict(torch.tensor(seen, dtype=torch.float32), [torch.Generator()] * 5)

    unit = 2 * (seen - low) / (high - low) - 1
    for row in range(5):
        for step in range(act):
            chunk = unit[row].sum() + 100 * (observe - 1 + step) + 10 * np.arange(3)
            expected = lowest + (chunk + 1) / 2 * (highest - lowest)
            np.testing.assert_allclose(actions[row, step], expected, rtol=1e-5)
    assert actions.shape == (5, act, 3)


@pytest.mark.parametrize(("observe", "horizon", "act"), [(2, 4, 4), (1, 1, 2), (5, 4, 1)])
def test_a_horizon_that_does_not_reach(observe: int, horizon: int, act: int) -> None:
    with pytest.raises(UserError, match=f"horizon={horizon} is too short.*set horizon to {observe - 1 + act} or more"):
        policy(observe=observe, horizon=horizon, act=act)


def test_an_unknown_base_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown base optimizer 'adm'; choose from adamw, muon, sgd"):
        policy(optimizer=OptimizerConfig(base="adm"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["observation", "action"])
def test_the_window_that_is_not_finite_is_named(name: str, value: float) -> None:
    batch = {"observation": torch.zeros(6, 2, 2), "action": torch.zeros(6, 4, 1)}
    assert policy().on_before_batch_transfer(batch, 0) is batch
    batch[name][3, 1, 0] = value
    batch[name][5, 0, 0] = value
    with pytest.raises(UserError, match=f"NaN or infinity: '{name}', window 3; clean the demonstrations"):
        policy().on_before_batch_transfer(batch, 0)


class Spoil(Callback):
    """Puts a NaN into the demonstrations when the second epoch starts, and keeps the weights of the last good step."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.datamodule._split[0].actions[30] = np.nan

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.good = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_nan_stops_the_run_before_the_weights_change(tmp_path: Path) -> None:
    module, spoil = policy(), Spoil()
    with pytest.raises(UserError, match=r"'action', window \d+"):
        trainer(tmp_path, spoil).fit(module, datamodule=data())
    for name, value in module.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, spoil.good[name]), name


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"observation_dim": 3}, "policy has observation_dim=3, the data 2"),
        ({"action_dim": 4}, "policy has action_dim=4, the data 1"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_data_of_another_size(tmp_path: Path, sizes: dict[str, int], said: str, verb: str) -> None:
    with pytest.raises(UserError, match=said):
        getattr(trainer(tmp_path), verb)(policy(**sizes), datamodule=data())


def test_a_checkpoint_of_another_size(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(policy(), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = policy(network=partial(ResidualMLP, width=16, depth=1))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError, match=r"network.input.weight has shape \(8, 4\) in it and \(16, 4\) here"):
        trainer(tmp_path).fit(other, datamodule=data(), ckpt_path=tmp_path / "a.ckpt")
    for name, value in other.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()) or "normalizer" in name


UNET = (
    "--model.network=dopr_lightning.policies.networks.ConditionalUnet1d",
    "--model.network.channels=[8,16]",
    "--model.network.groups=4",
    "--model.network.kernel_size=3",
    "--model.network.condition_dim=8",
)


@pytest.mark.parametrize("network", [(), UNET], ids=["mlp", "unet"])
def test_the_checkpoint_alone_rebuilds_the_policy(tmp_path: Path, network: tuple[str, ...]) -> None:
    """Nothing else is needed, and no code is unpickled: torch.load refuses whatever is not plain."""
    cli = train(tmp_path, *network, "--trainer.max_steps=8", "--model.optimizer.options={'betas': [0.8, 0.9]}")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not torch.equal(*(checkpoint[k]["network.readout.weight"] for k in ("state_dict", "current_model_state")))

    rebuilt = PolicyModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    live = cli.model  # after fit, with the average in place
    assert type(rebuilt.network) is type(live.network)
    assert rebuilt.optimizer_config == live.optimizer_config
    assert rebuilt.optimizer_config.options == {"betas": [0.8, 0.9]}
    assert (rebuilt.observe, rebuilt.horizon, rebuilt.act, rebuilt.seed) == (2, 4, 2, 0)
    assert (rebuilt.algorithm.steps, rebuilt.algorithm.start) == (2, "noise")  # type: ignore[attr-defined]
    observations = torch.randn(7, 2, 2)

    def act(module: PolicyModule) -> Tensor:
        return module.eval().predict(observations, [torch.Generator().manual_seed(i) for i in range(7)])

    assert torch.equal(act(rebuilt), act(live))
    live.load_state_dict(checkpoint["current_model_state"])
    assert not torch.equal(act(rebuilt), act(live))


def test_a_policy_made_in_python_leaves_no_objects_in_its_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(policy(FlowMatching()), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["horizon"] == 4
    assert not {"network", "algorithm", "optimizer"} & set(kept)
    again = PolicyModule.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, network=partial(ResidualMLP, width=8, depth=1), algorithm=FlowMatching()
    )
    assert again.observation_normalizer.fitted


def test_a_fitted_normaliser_is_kept(tmp_path: Path) -> None:
    """Training goes on with the units it began with, whatever the data now."""
    module = policy()
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data())
    scale = module.action_normalizer.scale.clone()
    more = data()
    more._split[0].actions[:] *= 2
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=more)
    assert torch.equal(module.action_normalizer.scale, scale)
