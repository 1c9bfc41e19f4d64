"""DoPr in LightningModules nobody here wrote: two lines, precisions, clipping, several optimizers, resuming, DDP."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import lightning as L
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from same import assert_same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dopr_lightning import ActivationPreconditioner, DoPr, configure_optimizers


class Tokens(Dataset):
    """WikiText2's shape, without its download."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(50, (13,), generator=torch.Generator().manual_seed(index))
        return text[:-1], text[1:]


class Transformer(LightningTransformer):
    """Lightning's demo transformer, and the first of the two lines."""

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, base="muon", lr=3e-3, schedule="cosine", warmup_steps=2, total_steps=12)

    def prepare_data(self) -> None:
        """Not the demo's download."""


def trainer(folder: Path, callback: DoPr, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(vocab_size=50)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn from the global generator, which Lightning does not put into checkpoints
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def test_a_demo_transformer_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = DataLoader(Tokens(), batch_size=8)
    whole = transformer()
    trainer(tmp_path, DoPr(update_every=4, ema=0.5), max_epochs=2).fit(whole, data)

    half = transformer()
    start = {name: p.detach().clone() for name, p in half.named_parameters()}
    first = trainer(tmp_path, DoPr(update_every=4, ema=0.5), max_epochs=1)
    first.fit(half, data)
    checkpoint = first.checkpoint_callback.best_model_path

    resumed = transformer()
    trainer(tmp_path, DoPr(update_every=4, ema=0.5), max_epochs=2).fit(resumed, data, ckpt_path=checkpoint)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, start[name]) or not a.requires_grad, name


def test_the_rewrite_comes_before_clipping_and_after_accumulation(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Probe(BoringModel):
        def configure_optimizers(self) -> Any:
            return configure_optimizers(self, base="sgd", lr=1e-3)

        def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
            seen["clipped"] = self.layer.weight.grad.clone()
            seen["steps"] = seen.get("steps", 0) + 1

    class Before(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            seen["raw"] = pl_module.layer.weight.grad.clone()

    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    fit = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[Before(), DoPr(damping=0.1)],
        max_epochs=1,
        accumulate_grad_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        limit_val_batches=0,
    )
    fit.fit(Probe(), DataLoader(x, batch_size=4))
    sigma = x.T @ x / 12
    expected = seen["raw"] @ torch.linalg.inv(sigma + 0.1 * sigma.trace() * torch.eye(32))
    torch.testing.assert_close(seen["clipped"], expected, rtol=1e-4, atol=1e-6)
    assert seen["steps"] == 1


def test_padding_can_be_left_out(tmp_path: Path) -> None:
    x, real = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12) < 7

    class Padded(BoringModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with callback.mask(real):
                return self.layer(batch)[real].square().mean()

        def configure_optimizers(self) -> Any:
            return configure_optimizers(self, base="sgd", lr=1e-3)

    callback, model = DoPr(damping=0.1), Padded()
    model.layer(x[real]).square().mean().backward()
    raw = model.layer.weight.grad.clone()
    model.zero_grad()
    options = {"max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer(tmp_path, callback, **options).fit(model, DataLoader(x, batch_size=12))
    sigma = x[real].T @ x[real] / 7
    expected = raw @ torch.linalg.inv(sigma + 0.1 * sigma.trace() * torch.eye(32))
    torch.testing.assert_close(model.layer.weight.grad, expected, rtol=1e-4, atol=1e-6)


class Boring(BoringModel):
    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, base="adamw", lr=1e-2)

    def on_train_end(self) -> None:
        if self.trainer.world_size > 1:
            weights = self.all_gather(self.layer.weight)
            assert torch.equal(weights[0], weights[1])


def test_two_ranks_stay_bit_identical(tmp_path: Path) -> None:
    model = Boring()
    before = model.layer.weight.detach().clone()
    options = {"max_steps": 5, "strategy": "ddp_spawn", "devices": 2, "enable_checkpointing": False}
    trainer(tmp_path, DoPr(), **options).fit(model, DataLoader(RandomDataset(32, 64), batch_size=4))
    assert not torch.equal(before, model.layer.weight)


def test_bad_damping_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="damping must be positive, got -1"):
        DoPr(damping=-1)


def test_nothing_is_left_on_the_model_after_fit(tmp_path: Path) -> None:
    model = Boring()
    trainer(tmp_path, DoPr(), max_steps=1, enable_checkpointing=False).fit(model)
    assert not model.layer._forward_hooks


class Fails(Boring):
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("the user's own mistake")


def test_nothing_is_left_on_the_model_after_an_exception(tmp_path: Path) -> None:
    model = Fails()
    with pytest.raises(KeyError):
        trainer(tmp_path, DoPr(), max_steps=2, enable_checkpointing=False).fit(model)
    assert not model.layer._forward_hooks


def test_an_exception_is_told_though_the_refresh_under_way_fails_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Overflows(Boring):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 5:
                raise KeyError("the user's own mistake")
            return self.layer(batch * torch.nan if batch_idx == 4 else batch).nan_to_num().square().mean()

    class Last(L.Callback):
        told = False

        def on_exception(self, *args: Any) -> None:
            self.told = True

    last, dopr = Last(), DoPr(solver="lowrank", overlap=True, update_every=2, max_failures=1)
    failing = trainer(tmp_path, dopr, max_steps=8, enable_checkpointing=False)
    failing.callbacks.append(last)
    with pytest.raises(KeyError, match="the user's own mistake"):
        failing.fit(Overflows())
    assert last.told
    assert "DoPr's own end failed too: layer.weight" in caplog.text
    assert [state["steps"] for state in dopr.state_dict()["preconditioners"]] == [5]


def test_hooks_that_an_exception_left_behind_go_with_the_next_fit(tmp_path: Path) -> None:
    class Raises(L.Callback):
        def on_exception(self, *args: Any) -> None:
            raise OSError("no room for a last checkpoint")

    model, dopr = Fails(), DoPr()
    failing = trainer(tmp_path, dopr, max_steps=2, enable_checkpointing=False)
    failing.callbacks.insert(0, Raises())
    with pytest.raises(OSError, match="no room"):
        failing.fit(model)
    assert model.layer._forward_hooks
    trainer(tmp_path, dopr, max_steps=1, enable_checkpointing=False).fit(Boring())
    assert not model.layer._forward_hooks


def test_a_module_may_keep_the_callback_among_its_hyperparameters(tmp_path: Path) -> None:
    class Keeps(Boring):
        def __init__(self, dopr: DoPr) -> None:
            super().__init__()
            self.save_hyperparameters()

    dopr = DoPr(damping=GAMMA)
    first = trainer(tmp_path, dopr, max_steps=1)
    first.fit(Keeps(dopr))
    saved = torch.load(first.checkpoint_callback.best_model_path, weights_only=False)["hyper_parameters"]["dopr"]
    assert saved.options == dopr.options
    assert not saved.preconditioners
    assert not saved.state_dict()  # the statistics are in the checkpoint once, as the callback's


def test_a_checkpoint_saved_after_fit_holds_the_covariances(tmp_path: Path) -> None:
    fit = trainer(tmp_path, DoPr(ema=0.9), max_steps=3, enable_checkpointing=False)
    fit.fit(Boring())
    fit.save_checkpoint(tmp_path / "after.ckpt")
    (state,) = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"].values()
    (preconditioner,) = state["preconditioners"]
    assert preconditioner["steps"] == 3
    assert preconditioner["layers"]["layer.weight"]["tensors"]["covariance"].abs().sum() > 0


def saved_steps(path: Path) -> int:
    (state,) = torch.load(path, weights_only=True)["callbacks"].values()
    return state["preconditioners"][0]["steps"]


def test_a_finished_run_that_is_resumed_and_saved_keeps_its_statistics(tmp_path: Path) -> None:
    options = {"max_steps": 3, "enable_checkpointing": False}
    first = trainer(tmp_path, DoPr(), **options)
    first.fit(Boring())
    first.save_checkpoint(tmp_path / "done.ckpt")
    again = trainer(tmp_path, DoPr(), **options)
    again.fit(Boring(), ckpt_path=tmp_path / "done.ckpt")  # nothing is left to train
    again.save_checkpoint(tmp_path / "again.ckpt")
    assert saved_steps(tmp_path / "again.ckpt") == 3


def test_a_fit_does_not_take_up_the_statistics_of_an_earlier_one(tmp_path: Path) -> None:
    plain = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=1, logger=False)
    plain.fit(Boring())
    dopr, steps = DoPr(), []

    class Starts(Boring):
        def on_train_batch_start(self, *args: Any) -> None:
            steps.append(dopr.state_dict()["preconditioners"][0]["steps"])

    trainer(tmp_path, dopr, max_steps=3, enable_checkpointing=False).fit(Boring())
    checkpoint = plain.checkpoint_callback.best_model_path  # of a run without DoPr
    trainer(tmp_path, dopr, max_steps=2, enable_checkpointing=False).fit(Starts(), ckpt_path=checkpoint)
    assert steps == [0]


# What the optimizer is given, against a closed form in float64.

GAMMA = 0.1


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rewritten(gradient: Tensor, rows: Tensor) -> Tensor:
    rows = rows.double()
    sigma = rows.T @ rows / len(rows)
    damping = GAMMA * sigma.trace() * torch.eye(len(sigma), dtype=torch.double)
    return gradient.double() @ torch.linalg.inv(sigma + damping)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


class Recorded(torch.optim.SGD):
    """Keeps what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        # Flat, so that norms over all parameters are those that clipping takes.
        self.given.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        super().step()
        return loss


class TwoLayers(L.LightningModule):
    """Keeps each layer's inputs."""

    def __init__(self, learning_rate: float = 0.01) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 2, bias=False)
        self.learning_rate = learning_rate
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def training_step(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.inputs.append((x.clone(), h.detach().clone()))
        return self.second(h).square().mean()

    def validation_step(self, x: Tensor) -> None:
        self.second(torch.tanh(self.first(x)))

    def configure_optimizers(self) -> Any:
        return Recorded(self.parameters(), lr=self.learning_rate)


class Gradients(L.Callback):
    """Keeps the gradients as callbacks before or behind it leave them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(name, p.grad) for name, p in pl_module.named_parameters() if id(p) in held]
        self.seen.append({name: gradient.clone() for name, gradient in named if gradient is not None})


def fit(
    folder: Path, model: L.LightningModule, dopr: DoPr, batches: Sequence[Any], **options: Any
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Train on the batches; the gradients before and after the rewrite, per step."""
    before, after = Gradients(), Gradients()
    checkpoint = options.pop("ckpt_path", None)
    defaults = {"logger": False, "enable_checkpointing": False, "max_epochs": 1}
    L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[before, dopr, after, *options.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | options),
    ).fit(model, DataLoader(batches, batch_size=None, shuffle=False), ckpt_path=checkpoint)
    return before.seen, after.seen


def scaled() -> MixedPrecision:
    """``precision="16-mixed"``, which Lightning offers on CPU only as a plugin. Scales are powers of two: exact."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_every_precision_takes_statistics_and_rewrite_in_float32(precision: str, tmp_path: Path) -> None:
    options = {"plugins": scaled()} if precision == "16-mixed" else {"precision": precision}
    model, dopr = TwoLayers(), DoPr(damping=GAMMA)
    batches = [3 * draw(step, 20, 6) * torch.logspace(0, -1.5, 6) for step in range(3)]
    before, after = fit(tmp_path, model, dopr, batches, **options)
    assert len(after) == 3
    assert model.inputs[0][1].dtype == {"3": torch.float, "1": torch.half, "b": torch.bfloat16}[precision[0]]
    # bf16-true rounds M to bf16 weights' gradients, and that is all.
    tolerance = 2**-8 if precision == "bf16-true" else 1e-4
    for step, (x, h) in enumerate(model.inputs):
        for name, rows in (("first.weight", x), ("second.weight", h)):
            expected = rewritten(before[step][name], rows.to(h.dtype))  # as autocast rounds them
            assert distance(after[step][name], expected) < tolerance, (step, name)
            assert distance(before[step][name], expected) > 0.1


class Fused(TwoLayers):
    """Its optimizer unscales gradients in its own step, after DoPr."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, fused=True)


@pytest.mark.parametrize("module", [TwoLayers, Fused])
@pytest.mark.parametrize("options", [{}, {"ema": 0.5}, {"update_every": 2}, {"solver": "lowrank"}])
def test_a_step_that_the_scaler_skips_leaves_no_trace(
    options: dict[str, Any], module: type[TwoLayers], tmp_path: Path
) -> None:
    bad = draw(9, 11, 6)
    bad[2, 3] = torch.inf
    runs = []
    for skipped in ([], [0], [1, 3], [0, 1, 2, 5]):
        model, dopr, plugin = module(), DoPr(damping=GAMMA, **options), scaled()
        batches = [draw(step, 8, 6) for step in range(4)]
        for place in skipped:
            batches.insert(place, bad)
        fit(tmp_path, model, dopr, batches, plugins=plugin)
        assert plugin.scaler.get_scale() == 256.0 / 2 ** len(skipped)
        runs.append((dopr.state_dict()["preconditioners"][0], list(model.parameters())))
    assert runs[0][0]["steps"] == 4
    for state, weights in runs[1:]:
        assert_same(state, runs[0][0])
        for found, expected in zip(weights, runs[0][1], strict=True):
            assert torch.equal(found, expected)


def test_a_short_last_window_of_accumulated_batches_counts_its_own_rows(tmp_path: Path) -> None:
    model = TwoLayers()
    batches = [draw(step, 7 + step, 6) for step in range(5)]
    before, after = fit(tmp_path, model, DoPr(damping=GAMMA), batches, accumulate_grad_batches=2, max_epochs=2)
    epoch = [(0, 1), (2, 3), (4,)]
    windows = epoch + [tuple(5 + i for i in window) for window in epoch]
    assert len(after) == len(windows)
    for step, window in enumerate(windows):
        for layer, name in enumerate(("first.weight", "second.weight")):
            rows = torch.cat([model.inputs[i][layer] for i in window])
            assert distance(after[step][name], rewritten(before[step][name], rows)) < 1e-4, (step, name)


def test_gradients_set_to_zero_without_a_step_take_their_rows_along(tmp_path: Path) -> None:
    class EverySecond(TwoLayers):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if batch_idx % 2 == 0:
                optimizer.step(closure=closure)
            else:
                closure()

    batches = [draw(step, 9, 6) for step in range(3)]
    before, after = fit(tmp_path, EverySecond(), DoPr(damping=GAMMA), batches)
    assert len(after) == 2
    for raw, m, x in zip(before, after, batches[::2], strict=True):
        assert distance(m["first.weight"], rewritten(raw["first.weight"], x)) < 1e-4


class Skips(Fused):
    """Has no loss for a batch of NaN."""

    def training_step(self, x: Tensor) -> Tensor | None:
        return None if x.isnan().any() else super().training_step(x)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_without_a_loss_leaves_no_trace(mixed: bool, tmp_path: Path) -> None:
    runs = []
    for skipped in ([], [0], [2]):
        dopr, batches = DoPr(damping=GAMMA, update_every=2), [draw(step, 8, 6) for step in range(4)]
        for place in skipped:
            batches.insert(place, torch.full((8, 6), torch.nan))
        fit(tmp_path, Skips(), dopr, batches, **({"plugins": scaled()} if mixed else {}))
        runs.append(dopr.state_dict()["preconditioners"][0])
    assert runs[0]["steps"] == 4
    for state in runs[1:]:
        assert_same(state, runs[0])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_bounds_what_the_optimizer_is_given(algorithm: str, tmp_path: Path) -> None:
    model, bound = TwoLayers(), 0.05
    options = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    before, after = fit(tmp_path, model, DoPr(damping=GAMMA), [draw(s, 9, 6) / 10 for s in range(3)], **options)
    for raw, m, given in zip(before, after, model.trainer.optimizers[0].given, strict=True):
        m, raw = (torch.cat([g.flatten() for g in grads.values()]) for grads in (m, raw))
        if algorithm == "norm":
            assert raw.norm() < bound < m.norm()  # only the rewrite makes it too large
            torch.testing.assert_close(given, m * bound / m.norm(), rtol=1e-4, atol=1e-8)
        else:
            assert raw.abs().max() < bound < m.abs().max()
            torch.testing.assert_close(given, m.clamp(-bound, bound))


class Game(L.LightningModule):
    """A generator and a critic that learn from each other; the critic more often."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(6, 5, bias=False), nn.Linear(5, 1, bias=False)
        self.rows: dict[str, list[Tensor]] = {"generator": [], "critic": []}

    def training_step(self, x: Tensor, index: int) -> None:
        generator, critic = self.optimizers()
        self.toggle_optimizer(critic)
        fake, real = self.generator(x), x[:, 1:]
        self.rows["critic"].append(torch.cat([fake.detach(), real]))
        self.manual_backward((self.critic(fake) - self.critic(real) + 1).square().mean())
        critic.step()
        critic.zero_grad()
        self.untoggle_optimizer(critic)
        if index % 3 == 1:
            return
        self.toggle_optimizer(generator)
        self.rows["generator"].append(x)
        self.manual_backward(self.critic(self.generator(x)).square().mean())
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.generator, self.critic)]


def test_two_optimizers_have_statistics_and_cadences_of_their_own(tmp_path: Path) -> None:
    model, dopr = Game(), DoPr(damping=GAMMA, update_every=2)
    batches = [draw(step, 9, 6) for step in range(7)]
    before, after = fit(tmp_path, model, dopr, batches)
    steps = {"generator": 0, "critic": 0}
    for raw, m in zip(before, after, strict=True):
        (name,) = raw
        part = name.partition(".")[0]
        refreshed = steps[part] - steps[part] % 2
        assert distance(m[name], rewritten(raw[name], model.rows[part][refreshed])) < 1e-4, (name, steps)
        steps[part] += 1
    assert steps == {"generator": 5, "critic": 7}
    generator, critic = dopr.state_dict()["preconditioners"]
    assert (generator["steps"], critic["steps"]) == (5, 7)
    assert list(generator["layers"]) == ["generator.weight"]
    assert list(critic["layers"]) == ["critic.weight"]
    assert generator["layers"]["generator.weight"]["rows_seen"] == 9
    assert critic["layers"]["critic.weight"]["rows_seen"] == 18


class Pooled(L.LightningModule):
    """Two optimizers: one for layers that see positions, one for a head that does not, and steps before them."""

    def __init__(self, dopr: DoPr, mask: Tensor) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.dopr, self.mask = dopr, mask
        self.encoder, self.head = nn.Linear(6, 5), nn.Linear(5, 1)

    def training_step(self, x: Tensor, index: int) -> None:
        encoder, head = self.optimizers()
        with self.dopr.mask(self.mask):
            h = self.encoder(x).mean(1)
            own, shared = self.head(h.detach()).square().mean(), h.square().mean()
        for loss, optimizer in ((own, head), (shared, encoder)):
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.encoder, self.head)]


@pytest.mark.parametrize(("positions", "warnings"), [((9, 4), 0), ((9, 3), 1)])
def test_a_mask_need_only_fit_a_layer_of_one_optimizer(
    positions: tuple[int, int], warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dopr = DoPr()
    model = Pooled(dopr, torch.arange(positions[1]).expand(positions) < 2)
    fit(tmp_path, model, dopr, [draw(step, 9, 4, 6) for step in range(3)])
    told = [message for message in caplog.messages if "the mask of shape" in message]
    assert len(told) == warnings, told
    assert all(f"{positions} fits the input of no covered layer" in message for message in told)


def test_a_mask_of_a_callback_that_no_trainer_has_is_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One DoPr for the module and another for the Trainer, say, or a copy from a checkpoint's hyperparameters."""
    own, trainers = DoPr(), DoPr()
    with torch.no_grad(), own.mask(torch.ones(9, 4) > 0):  # whoever predicts need not have a Trainer
        pass
    assert not caplog.messages
    fit(tmp_path, Pooled(own, torch.arange(4).expand(9, 4) < 2), trainers, [draw(step, 9, 4, 6) for step in range(3)])
    (told,) = [message for message in caplog.messages if "mask" in message]
    assert "Trainer(callbacks=[...])" in told


def test_a_summary_of_all_optimizers_is_there_during_a_fit_and_after_it(tmp_path: Path) -> None:
    dopr, model, during = DoPr(damping=GAMMA), Game(), []
    model.critic = nn.Linear(5, 1)

    class Look(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            during.append(dopr.summary())

    with pytest.raises(RuntimeError, match=r"no Trainer that has it in callbacks=\[...\] has begun a fit"):
        dopr.summary()
    fit(tmp_path, model, dopr, [draw(step, 9, 6) for step in range(3)], callbacks=[Look()])
    assert not dopr.preconditioners
    assert [dopr.summary()] == during
    assert [row.parameter for row in dopr.summary()] == [name for name, _ in model.named_parameters()]
    covered = {row.parameter: row.rows for row in dopr.summary() if row.covered}
    assert covered.keys() == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert all(covered.values())
    reasons = {row.parameter: row.reason for row in ActivationPreconditioner(model).summary()}
    assert {row.parameter: row.reason for row in dopr.summary()} == reasons
    with pytest.raises(RuntimeError, match="nothing to say"):
        copy.deepcopy(dopr).summary()


def test_a_refresh_that_overlaps_is_finished_before_the_model_leaves_its_device(tmp_path: Path) -> None:
    """Lightning moves it off the GPU before the callback's teardown; to nowhere, here."""

    class Leaving(TwoLayers):
        def cpu(self) -> Self:
            return self.to("meta")

    dopr = DoPr(damping=GAMMA, update_every=4, overlap=True, solver="lowrank", max_error=1e-6)
    fit(tmp_path, Leaving(), dopr, [draw(step, 60, 6) for step in range(5)])
    (state,) = dopr.state_dict()["preconditioners"]
    layers = state["layers"].values()
    assert [layer["refreshed_at"] for layer in layers] == [4] * len(layers)
    assert all(tensor.device.type == "cpu" for layer in layers for tensor in layer["tensors"].values())


def test_two_optimizers_resume_bit_for_bit(tmp_path: Path) -> None:
    class Resumable(Game):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0 and save:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")

    batches, weights, save = [draw(step, 9, 6) for step in range(3)], [], True
    for checkpoint in (None, tmp_path / "half.ckpt"):
        model = Resumable()
        options = {"max_epochs": 2, "ckpt_path": checkpoint}
        resume(tmp_path, model, DoPr(update_every=2, ema=0.5), batches, **options)
        weights.append([p.detach().clone() for p in model.parameters()])
        save = False
    assert len(model.rows["critic"]) == 3  # the second run took the second epoch only
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def resume(
    folder: Path,
    model: L.LightningModule,
    dopr: DoPr,
    batches: Sequence[Any],
    *,
    ckpt_path: Path | None,
    **options: Any,
) -> None:
    trainer(folder, dopr, enable_checkpointing=False, **options).fit(
        model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path
    )


def test_state_of_another_number_of_optimizers_is_refused(tmp_path: Path) -> None:
    two = trainer(tmp_path, DoPr(), enable_checkpointing=False, max_epochs=1)
    two.fit(Game(), DataLoader([draw(0, 9, 6)], batch_size=None))
    two.save_checkpoint(tmp_path / "two.ckpt")
    checkpoint = torch.load(tmp_path / "two.ckpt", weights_only=True)

    class One(Game):
        def training_step(self, x: Tensor, index: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.critic(self.generator(x)).square().mean())
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    checkpoint["optimizer_states"] = [torch.optim.SGD(One().parameters(), lr=0.01).state_dict()]
    torch.save(checkpoint, tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"holds DoPr's state for 2 optimizers, this run has 1"):
        resume(tmp_path, One(), DoPr(), [draw(0, 9, 6)], ckpt_path=tmp_path / "one.ckpt", max_epochs=3)


def test_an_optimizer_with_nothing_to_precondition_is_left_alone(tmp_path: Path) -> None:
    class WithTemperature(Game):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def training_step(self, x: Tensor, index: int) -> None:
            networks, temperature = self.optimizers()
            self.manual_backward((self.temperature * self.critic(self.generator(x))).square().mean())
            networks.step()
            temperature.step()

        def configure_optimizers(self) -> Any:
            networks = [*self.generator.parameters(), *self.critic.parameters()]
            return [torch.optim.SGD(networks, lr=0.01), torch.optim.SGD([self.temperature], lr=0.01)]

    model, dopr = WithTemperature(), DoPr(damping=GAMMA)
    before, after = fit(tmp_path, model, dopr, [draw(0, 9, 6)])
    assert distance(after[0]["generator.weight"], rewritten(before[0]["generator.weight"], draw(0, 9, 6))) < 1e-4
    assert torch.equal(after[1]["temperature"], before[1]["temperature"])
    assert dopr.state_dict()["preconditioners"][1] is None


def parts() -> list[DoPr]:
    return [DoPr(include=["first"], damping=GAMMA), DoPr(include=["second"], damping=2 * GAMMA, update_every=2)]


def test_two_callbacks_give_two_parts_options_of_their_own_and_resume_bit_for_bit(tmp_path: Path) -> None:
    class Saves(TwoLayers):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 0 and checkpoint is None:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")

    batches, weights = [draw(step, 9, 6) for step in range(3)], []
    for checkpoint in (None, tmp_path / "half.ckpt"):
        model, (first, second) = Saves(), parts()
        options = {"callbacks": [second], "max_epochs": 2, "ckpt_path": checkpoint}
        before, after = fit(tmp_path, model, first, batches, **options)
        weights.append([p.detach().clone() for p in model.parameters()])
        # DoPr(second) stands behind what records.
        for raw, m, (x, _) in zip(before, after, model.inputs, strict=True):
            assert distance(m["first.weight"], rewritten(raw["first.weight"], x)) < 1e-4
            assert torch.equal(m["second.weight"], raw["second.weight"])
        states = [dopr.state_dict()["preconditioners"][0] for dopr in (first, second)]
        assert [list(state["layers"]) for state in states] == [["first.weight"], ["second.weight"]]
        assert [state["steps"] for state in states] == [6, 6]
        last = model.trainer.optimizers[0].given[-1][30:].view(2, 5)
        rows = model.inputs[-2][1].double()  # refreshed at every second step
        sigma = rows.T @ rows / len(rows)
        expected = before[-1]["second.weight"].double() @ torch.linalg.inv(
            sigma + 2 * GAMMA * sigma.trace() * torch.eye(5, dtype=torch.double)
        )
        assert distance(last, expected) < 1e-4
    assert len(model.inputs) == 3
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_two_callbacks_on_one_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^first\.weight: two DoPr callbacks cover it, .* give each an include"):
        fit(tmp_path, TwoLayers(), DoPr(), [draw(0, 9, 6)], callbacks=[DoPr(include=["first"])])


@pytest.mark.parametrize("key", ["DoPr", "DoPr{'include': ['f*']}"])
def test_the_only_state_of_a_checkpoint_is_found_whatever_its_key(key: str, tmp_path: Path) -> None:
    """Keys of older checkpoints have no patterns; and a state of other layers is refused, not passed over."""
    options = {"max_steps": 2, "enable_checkpointing": False}
    data = DataLoader([draw(step, 9, 6) for step in range(4)], batch_size=None)
    first = trainer(tmp_path, DoPr(include=["first"]), **options)
    first.fit(TwoLayers(), data)
    first.save_checkpoint(tmp_path / "first.ckpt")
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=True)
    checkpoint["callbacks"] = {key: checkpoint["callbacks"]["DoPr{'include': ['first']}"]}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    dopr = DoPr(include=["first"])
    longer = options | {"max_steps": 3}
    trainer(tmp_path, dopr, **longer).fit(TwoLayers(), data, ckpt_path=tmp_path / "other.ckpt")
    assert dopr.state_dict()["preconditioners"][0]["steps"] == 3
    with pytest.raises(ValueError, match="state was saved for other layers"):
        trainer(tmp_path, DoPr(), **longer).fit(TwoLayers(), data, ckpt_path=tmp_path / "other.ckpt")


class Backbone(TwoLayers):
    """Whose backbone is frozen at first, and trained from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def training_step(self, x: Tensor) -> Tensor:
        return super().training_step(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("behind", [False, True])
def test_gradual_unfreezing_is_pointed_out_before_training_with_a_way_out_that_works(
    behind: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(dopr: DoPr) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], Backbone]:
        model, tuner = Backbone(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        before, after = Gradients(), Gradients()
        callbacks = [before, dopr, after]
        callbacks.insert(3 if behind else 0, tuner)
        L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=2,
        ).fit(model, DataLoader([draw(step, 9, 6) for step in range(2)], batch_size=None, shuffle=False))
        return before.seen, after.seen, model

    with pytest.raises(RuntimeError, match=r"backbone\.0\.weight: was frozen when the preconditioner was made"):
        run(DoPr(damping=GAMMA))
    assert "BackboneFinetuning may unfreeze layers" in caplog.text
    assert "to leave those that are frozen now to the base optimizer: DoPr(exclude=['backbone.*'])" in caplog.text
    caplog.clear()
    before, after, model = run(DoPr(damping=GAMMA, exclude=["backbone.*"]))
    assert ["backbone.0.weight" in seen for seen in before] == [False, False, True, True]
    for raw, m, (x, _) in zip(before, after, model.inputs, strict=True):
        assert distance(m["first.weight"], rewritten(raw["first.weight"], x)) < 1e-4
        assert all(torch.equal(m[name], raw[name]) for name in raw if name.startswith("backbone"))
    assert "unfreeze" not in caplog.text


class Half(TwoLayers):
    """Its optimizer holds the second layer alone, and nobody zeroes the gradient of the first."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.second.parameters(), lr=0.01)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_no_optimizer_holds_are_left_alone(frozen: bool, tmp_path: Path) -> None:
    class Frozen(TwoLayers):
        """Frozen before training, and among the optimizer's parameters all the same."""

        def __init__(self) -> None:
            super().__init__()
            self.first.requires_grad_(False)

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, *args: Any) -> None:
            reasons.update({row.parameter: row.reason for row in dopr.preconditioners[0].summary()})
            gradients.append(None if model.first.weight.grad is None else model.first.weight.grad.clone())

    model, dopr, batches = Frozen() if frozen else Half(), DoPr(damping=GAMMA), [draw(step, 9, 6) for step in range(3)]
    if frozen:
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.01)  # type: ignore[method-assign]
    reasons, gradients = {}, []
    before, after = fit(tmp_path, model, dopr, batches, callbacks=[Look()])
    for step, (_, h) in enumerate(model.inputs):
        expected = rewritten(before[step]["second.weight"], h)
        assert distance(after[step]["second.weight"], expected) < 1e-4
    assert reasons["second.weight"] == ""
    if frozen:
        assert "frozen" in reasons["first.weight"]
        return
    assert reasons["first.weight"] == "its weight is not among the optimizer's parameters"
    plain = Half()
    expected = torch.zeros_like(plain.first.weight)
    for step, x in enumerate(batches):  # by the plain gradients, as they add up
        weight = model.second.weight.detach() + 0.01 * sum(m["second.weight"] for m in after[step:])
        plain.second.weight.data.copy_(weight)
        plain.training_step(x).backward()
        expected = plain.first.weight.grad
        torch.testing.assert_close(gradients[step], expected)


def test_an_optimizer_that_holds_nothing_to_precondition_is_refused_where_it_is_the_only_one(tmp_path: Path) -> None:
    class Norm(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.norm.parameters(), lr=0.01)

    with pytest.raises(ValueError, match="nothing to precondition: no optimizer holds the weight of a layer"):
        fit(tmp_path, Norm(), DoPr(), [draw(0, 9, 6)])


def test_an_optimizer_whose_layers_are_all_unfrozen_later_is_named(tmp_path: Path) -> None:
    class WarmUp(Game):
        def __init__(self) -> None:
            super().__init__()
            self.critic.requires_grad_(False)

        def training_step(self, x: Tensor, index: int) -> None:
            if index == 2:
                self.critic.requires_grad_(True)
            for optimizer in self.optimizers()[: 1 + (index >= 2)]:
                self.toggle_optimizer(optimizer)
                self.manual_backward(self.critic(self.generator(x)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

    with pytest.raises(RuntimeError, match=r"critic\.weight: was frozen when the preconditioner was made"):
        fit(tmp_path, WarmUp(), DoPr(), [draw(step, 9, 6) for step in range(4)])


class Manual(TwoLayers):
    """Steps after every fourth batch, itself."""

    def __init__(self, use_pl_optimizer: bool = True) -> None:
        super().__init__()
        self.automatic_optimization, self.use_pl_optimizer = False, use_pl_optimizer

    def training_step(self, x: Tensor, index: int) -> None:
        optimizer = self.optimizers(self.use_pl_optimizer)
        self.manual_backward(super().training_step(x))
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("use_pl_optimizer", [True, False])
def test_steps_that_lightning_does_not_see_are_reported(
    use_pl_optimizer: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Manual(use_pl_optimizer)
    before, _ = fit(tmp_path, model, DoPr(), [draw(step, 9, 6) for step in range(4)])
    assert len(before) == use_pl_optimizer
    assert ("DoPr rewrote no gradient in 4 batches" in caplog.text) is not use_pl_optimizer


class Elsewhere(TwoLayers):
    """Its gradients are nowhere to be found, as those of a strategy with a form of its own."""

    def on_after_backward(self) -> None:
        self.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_gradients_that_are_never_there_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, Elsewhere(), DoPr(), [draw(step, 9, 6) for step in range(4)])
    assert "DoPr rewrote no gradient in 4 batches: when an optimizer was to step" in caplog.text


def test_steps_that_a_scaler_skips_are_no_such_case(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**100))
    fit(tmp_path, TwoLayers(), DoPr(), [draw(step, 9, 6) for step in range(2)], plugins=plugin)
    assert "rewrote no gradient" not in caplog.text


@pytest.mark.parametrize(
    "strategy",
    [DeepSpeedStrategy, FSDPStrategy, pytorch_lightning.strategies.FSDPStrategy],
    ids=["deepspeed", "fsdp", "fsdp of pytorch_lightning"],
)
def test_strategies_that_keep_gradients_elsewhere_are_refused(strategy: type[Strategy]) -> None:
    trainer = L.Trainer(logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(ValueError, match=f"under {strategy.__name__}.*take strategy='ddp'"):
        DoPr().on_fit_start(trainer, TwoLayers())


@pytest.mark.parametrize("automatic", [True, False])
def test_an_optimizer_that_compares_gradients_with_losses_is_refused(automatic: bool, tmp_path: Path) -> None:
    class Searches(Boring):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    model = Searches()
    with pytest.raises(ValueError, match=r"^LBFGS evaluates the loss several times.*take adamw, muon or another"):
        trainer(tmp_path, DoPr(), max_epochs=1, enable_checkpointing=False).fit(model)
    assert not model.layer._forward_hooks


# Beside other callbacks and loggers.


def test_under_the_package_of_the_other_name_a_fit_is_the_same(tmp_path: Path) -> None:
    """Its Trainer, its module, and a checkpoint in the middle of the fit."""

    def weights(package: Any) -> dict[str, Tensor]:
        class Module(package.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

            def training_step(self, batch: Tensor, index: int) -> Tensor:
                return self.net(batch).square().mean()

            def configure_optimizers(self) -> Any:
                return configure_optimizers(self, "muon", lr=0.01, schedule="cosine", total_steps=6)

        def fit(model: Any, steps: int, ckpt: Path | None = None) -> Any:
            trainer = package.Trainer(
                max_steps=steps, callbacks=[DoPr(ema=0.5)], logger=False, enable_checkpointing=False, accelerator="cpu"
            )
            batches = [draw(step, 9, 6) for step in range(6)]
            trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt, weights_only=False)
            return trainer

        torch.manual_seed(0)
        path = tmp_path / f"{package.__name__}.ckpt"
        fit(Module(), 3).save_checkpoint(path)
        resumed = Module()
        fit(resumed, 6, path)
        return resumed.state_dict()

    ours, other = weights(L), weights(pytorch_lightning)
    assert all(torch.equal(value, other[name]) for name, value in ours.items())


def test_validation_and_weight_averaging_leave_the_statistics_alone(tmp_path: Path) -> None:
    """The average is a copy of the model, made by a callback, and validated in its place."""
    model, dopr, average = TwoLayers(), DoPr(damping=GAMMA), EMAWeightAveraging(decay=0.9)
    before, after, batches = Gradients(), Gradients(), [draw(step, 9, 6) for step in range(4)]
    L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[average, before, dopr, after],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        val_check_interval=1,
    ).fit(model, DataLoader(batches, batch_size=None), DataLoader([draw(9, 30, 6)], batch_size=None))
    assert len(after.seen) == 4
    for raw, m, x in zip(before.seen, after.seen, batches, strict=True):
        assert distance(m["first.weight"], rewritten(raw["first.weight"], x)) < 1e-4


def test_a_search_in_the_middle_of_training_leaves_no_trace(tmp_path: Path) -> None:
    """Its callbacks replace the trainer's, so DoPr takes no step and is given its state back afterwards."""

    class FineTune(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                self.lr_find(trainer, pl_module)

    finder = FineTune(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    dopr, batches = DoPr(damping=GAMMA, ema=0.5), [draw(step, 9, 6) for step in range(5)]
    states, rows = [], []
    for callbacks in ([], [finder]):
        model = TwoLayers()
        fit(tmp_path, model, dopr, batches, callbacks=callbacks, max_epochs=2)
        states.append(dopr.state_dict())
        rows.append(len(model.inputs))
    assert rows == [10, 13]
    assert_same(states[1], states[0])


def test_the_pass_that_renews_batch_norms_of_averaged_weights_is_no_step(tmp_path: Path) -> None:
    model, dopr = TwoLayers(), DoPr()
    model.second = nn.Sequential(nn.BatchNorm1d(5), model.second)
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    fit(tmp_path, model, dopr, [draw(step, 9, 6) for step in range(2)], callbacks=[averaging], max_epochs=2)
    assert len(model.inputs) == 6
    assert dopr.state_dict()["preconditioners"][0]["steps"] == 4


class Metrics(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.given.append((step, metrics))


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
def test_metrics_are_logged_at_their_interval_and_cost_nothing_between(
    solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"summary": 0, "measured": 0}
    step_, summary_ = ActivationPreconditioner.step, ActivationPreconditioner.summary

    def step(self: ActivationPreconditioner, *, measure: bool = False) -> None:
        calls["measured"] += measure
        step_(self, measure=measure)

    def summary(self: ActivationPreconditioner) -> Any:
        calls["summary"] += 1
        return summary_(self)

    monkeypatch.setattr(ActivationPreconditioner, "step", step)
    monkeypatch.setattr(ActivationPreconditioner, "summary", summary)
    model, logger = TwoLayers(), Metrics()
    dopr = DoPr(damping=GAMMA, update_every=2, solver=solver, log_every=3)
    before, after = fit(tmp_path, model, dopr, [draw(s, 9, 6) for s in range(8)], logger=logger)
    assert [step for step, _ in logger.given] == [0, 3, 6]
    assert calls == {"summary": 3, "measured": 3}
    names = {"condition_number", "effective_rank", "cosine", "update_rms", "failures"}
    names |= {"rank", "error"} if solver == "lowrank" else set()
    for step, metrics in logger.given:
        assert metrics.keys() == {f"dopr/{name}/{layer}.weight" for name in names for layer in ("first", "second")}
        for weight in ("first.weight", "second.weight"):
            g, m = before[step][weight].double().flatten(), after[step][weight].double().flatten()
            assert metrics[f"dopr/cosine/{weight}"] == pytest.approx(float(g @ m / g.norm() / m.norm()), rel=1e-5)
            assert metrics[f"dopr/update_rms/{weight}"] == pytest.approx(float(m.square().mean().sqrt()), rel=1e-5)
            assert metrics[f"dopr/failures/{weight}"] == 0
        rows = model.inputs[step - step % 2][0].double()  # of the last refresh; the low-rank warm-up has no say here
        if solver == "exact":
            eigenvalues = torch.linalg.eigvalsh(rows.T @ rows)
            condition = float(eigenvalues[-1] / eigenvalues[0])
            assert metrics["dopr/condition_number/first.weight"] == pytest.approx(condition, rel=1e-3)


def test_without_log_every_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationPreconditioner, "summary", None)
    logger = Metrics()
    fit(tmp_path, TwoLayers(), DoPr(), [draw(0, 9, 6)], logger=logger)
    assert logger.given == []


def test_tensorboard_gets_the_metrics_on_lightnings_own_axis(tmp_path: Path) -> None:
    class Logs(TwoLayers):
        def training_step(self, x: Tensor) -> Tensor:
            loss = super().training_step(x)
            self.log("loss", loss)
            return loss

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, Logs(), DoPr(log_every=2), [draw(s, 9, 6) for s in range(5)], logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("dopr/")]
    assert len(tags) == 10
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == [0, 2, 4], tag
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3, 4]


def test_a_window_of_accumulated_batches_is_logged_once(tmp_path: Path) -> None:
    logger = Metrics()
    options = {"accumulate_grad_batches": 2, "logger": logger}
    fit(tmp_path, TwoLayers(), DoPr(log_every=1), [draw(s, 9, 6) for s in range(5)], **options)
    assert [step for step, _ in logger.given] == [0, 1, 2]


def test_steps_of_manual_optimization_are_logged_at_their_own_interval(tmp_path: Path) -> None:
    logger = Metrics()
    fit(tmp_path, Manual(), DoPr(log_every=2), [draw(s, 9, 6) for s in range(16)], logger=logger)
    assert [step for step, _ in logger.given] == [3, 11]  # the first step and the third, of four batches each


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"update_every": 0}, "update_every must be at least 1, got 0"),
        ({"solver": "svd"}, "solver must be one of"),
        ({"max_error": -0.1}, "max_error must be positive"),
        ({"max_dim": 0}, "max_dim must be at least 1"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
        ({"max_failures": 0}, "max_failures must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused_when_the_callback_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoPr(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_every": 2.5}, "update_every must be a whole number, got 2.5"),
        ({"update_every": "10"}, "update_every must be a whole number, got '10'"),
        ({"update_every": None}, "update_every must be a whole number, got None"),
        ({"log_every": 2.5}, "log_every must be a whole number or None, got 2.5"),
        ({"max_dim": 3.5}, "max_dim must be a whole number or None, got 3.5"),
        ({"max_rows": True}, "max_rows must be a whole number or None, got True"),
        ({"damping": True}, "damping must be a number, got True"),
        ({"damping": "0.01"}, "damping must be a number, got '0.01'"),
        ({"ema": None}, "ema must be a number, got None"),
        ({"bias": "no"}, "bias must be True or False, got 'no'"),
        ({"overlap": 1}, "overlap must be True or False, got 1"),
        ({"exclude": None}, "exclude must be a list of globs, got None"),
        ({"exclude": "head"}, "exclude must be a list of globs, got 'head'; write ['head']"),
        ({"include": [1]}, "include must be a list of globs or None, got [1]"),
    ],
)
def test_options_of_another_type_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        DoPr(**options)
    if "log_every" not in options:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            ActivationPreconditioner(nn.Linear(4, 2), **options)


def test_numbers_of_numpy_are_numbers() -> None:
    DoPr(damping=np.float32(0.1), update_every=np.int64(2), max_dim=np.int32(8), include=("a", "b"))  # type: ignore[arg-type]
