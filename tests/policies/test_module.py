"""The LightningModule: its noise, its actions, its checkpoints, and what it refuses."""

from __future__ import annotations

import json
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
from dopr_lightning.mup import MupSpec
from dopr_lightning.policies.algorithms import Algorithm, Diffusion, FlowMatching, Regression
from dopr_lightning.policies.module import MupConfig, OptimizerConfig, PolicyModule
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


def test_actions_that_clipping_would_cut_are_refused() -> None:
    """At one standard deviation a third of the actions would be truncated, and nothing would say so."""
    with pytest.raises(UserError, match=r"Diffusion: clip .* action_normalizer='standard' .* clip to false"):
        policy(Diffusion(), action_normalizer="standard")
    for algorithm in (Diffusion(clip=False), FlowMatching(), Regression()):
        policy(algorithm, network=partial(ResidualMLP, width=8, depth=1), action_normalizer="standard")
    policy(Diffusion(), observation_normalizer="standard")


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


# muP ---------------------------------------------------------------------------------------------------------------

MUP = MupConfig({"width": 4}, zero_readouts=False)


def same(one: PolicyModule, other: PolicyModule) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_initial_values_are_muPs() -> None:  # noqa: N802
    plain, module = policy(), policy(mup=MUP)
    torch.testing.assert_close(module.network.readout.weight, plain.network.readout.weight / 2**0.5)
    torch.testing.assert_close(module.network.readout.bias, plain.network.readout.bias * 2**0.5)
    assert torch.equal(module.network.input.weight, plain.network.input.weight)
    assert not policy(mup=MupConfig({"width": 4})).network.readout.weight.any()


def test_the_base_shapes_are_in_the_checkpoint_as_plain_data(tmp_path: Path) -> None:
    module, run = policy(mup=MUP), trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert json.loads(json.dumps(checkpoint["mup"])) == checkpoint["mup"]
    assert MupSpec.from_state_dict(checkpoint["mup"]) == module.mup
    rates = {group["lr_mult"] for group in checkpoint["optimizer_states"][0]["param_groups"]}
    assert rates == {1.0, 0.5}

    network = partial(ResidualMLP, width=8, depth=1)
    again = PolicyModule.load_from_checkpoint(
        tmp_path / "a.ckpt", weights_only=True, network=network, algorithm=Regression(), mup=MUP
    )
    assert same(again, module)  # not rescaled
    assert not same(again, policy(mup=MUP))


MUP_MLP = ("--model.mup.base={'width': 4}",)
MUP_UNET = (*UNET, "--model.mup.base={'channels': [4, 8], 'condition_dim': 4}")


@pytest.mark.parametrize("options", [MUP_MLP, MUP_UNET], ids=["mlp", "unet"])
def test_the_checkpoint_alone_rebuilds_a_policy_under_mup(tmp_path: Path, options: tuple[str, ...]) -> None:
    cli = train(tmp_path, *options, "--trainer.max_steps=8", "--model.mup.weight_decay=coupled")
    rebuilt = PolicyModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert same(rebuilt, cli.model)
    assert rebuilt.mup == cli.model.mup is not None
    assert rebuilt.mup_config == cli.model.mup_config
    assert rebuilt.mup_config.weight_decay == "coupled"


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        (
            MUP,
            MupConfig({"width": 2}),
            r"with the muP base \{'width': 4\}, and this policy has \{'width': 2\}; give --mod",
        ),
        (MUP, None, r"with the muP base \{'width': 4\}, and this policy has none"),
        (None, MUP, r"with the muP base none, and this policy has \{'width': 4\}"),
    ],
)
def test_a_checkpoint_of_another_base(
    tmp_path: Path, theirs: MupConfig | None, ours: MupConfig | None, said: str
) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(policy(mup=theirs), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = policy(mup=ours)
    with pytest.raises(UserError, match=said):
        trainer(tmp_path).fit(other, datamodule=data(), ckpt_path=tmp_path / "a.ckpt")
    assert same(other, policy(mup=ours))
    with pytest.raises(UserError, match=said):
        PolicyModule.load_from_checkpoint(
            tmp_path / "a.ckpt",
            weights_only=True,
            network=partial(ResidualMLP, width=8, depth=1),
            algorithm=Regression(),
            mup=ours,
        )


def test_a_checkpoint_of_another_network_at_the_same_base(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(policy(mup=MUP), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for network, said in (
        (partial(ResidualMLP, width=8, depth=2), r"at the muP base \{'width': 4\} its network has other shapes"),
        (partial(ResidualMLP, width=16, depth=1), r"network.input.weight has shape \(8, 4\) in it and \(16, 4\) here"),
    ):
        with pytest.raises(UserError, match=said):
            trainer(tmp_path).fit(policy(mup=MUP, network=network), datamodule=data(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_resume_under_mup_is_bit_identical(tmp_path: Path, base: str) -> None:
    def start() -> PolicyModule:
        return policy(mup=MUP, optimizer=OptimizerConfig(base, lr=1e-2, weight_decay=0.1, warmup_steps=2))

    whole = start()
    trainer(tmp_path, max_steps=20, max_epochs=-1).fit(whole, datamodule=data())

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer(tmp_path, Save(), max_steps=20, max_epochs=-1).fit(start(), datamodule=data())
    resumed = start()
    with torch.no_grad():
        resumed.network.readout.weight.add_(1)  # whatever it starts from does not matter
    trainer(tmp_path, max_steps=20, max_epochs=-1).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "half.ckpt")
    assert same(resumed, whole)


@pytest.mark.parametrize("base", [{"depth_": 1}, {"width": 4, "channels": [4]}])
def test_keywords_that_the_network_does_not_have(base: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"mup\.base .*name keywords of the network that scale with it"):
        policy(mup=MupConfig(base))


def test_a_base_wider_than_the_network() -> None:
    with pytest.raises(
        ValueError, match=r"shape \(8, 4\), narrower than the base model's \(16, 4\); choose a base width"
    ):
        policy(mup=MupConfig({"width": 16}))
