"""DoPr in LightningModules nobody here wrote: two lines, resume bit for bit, DDP."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader, Dataset

from dopr_lightning import DoPr, configure_optimizers


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


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    class Two(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    with pytest.raises(ValueError, match="DoPr needs one optimizer, Two has 2"):
        trainer(tmp_path, DoPr(), max_steps=1, enable_checkpointing=False).fit(Two())


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


def test_a_checkpoint_saved_after_fit_holds_the_covariances(tmp_path: Path) -> None:
    fit = trainer(tmp_path, DoPr(ema=0.9), max_steps=3, enable_checkpointing=False)
    fit.fit(Boring())
    fit.save_checkpoint(tmp_path / "after.ckpt")
    (state,) = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"].values()
    assert state["steps"] == 3
    assert state["layers"]["layer.weight"]["covariance"].abs().sum() > 0
