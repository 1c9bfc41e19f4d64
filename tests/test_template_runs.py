"""Projects of the template at work: their own tests, two processes, resuming, a sweep and the run it recommends."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from baking import CHOICES, bake, possible, run
from lightning.pytorch.callbacks import ModelCheckpoint

from dopr_lightning.data import Demonstrations, Source

KEYS = ("task", "policy", "network", "base", "mup", "logger", "trainer")
PROJECTS = [
    dict(zip(KEYS, row, strict=True))
    for row in [
        ("gymnasium", "flow", "mlp", "adamw", True, "tensorboard", "cpu"),
        ("own", "diffusion", "unet", "muon", True, "csv", "ddp"),
        ("own", "regression", "transformer", "sgd", False, "tensorboard", "gpu"),
        ("gymnasium", "diffusion", "transformer", "signum", True, "wandb", "slurm"),
        ("pusht", "flow", "unet", "lion", False, "csv", "ddp"),
        ("robomimic", "regression", "mlp", "soap", True, "csv", "cpu"),
        ("own", "flow", "mlp", "adamuon", False, "csv", "fsdp2"),
    ]
]

SMALL = [
    "--data.batch_size=8",
    "--model.optimizer.schedule=constant",
    "--model.optimizer.warmup_steps=0",
    "--rollout.episodes=0",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.enable_progress_bar=false",
]


def test_every_answer_is_in_a_project() -> None:
    for key in KEYS:
        assert {project[key] for project in PROJECTS} == set(CHOICES[key]), key
    assert all(map(possible, PROJECTS))


@pytest.mark.parametrize("answers", PROJECTS, ids=lambda answers: "-".join(map(str, answers.values())))
def test_it_works(answers: dict[str, Any], tmp_path: Path) -> None:
    project = bake(tmp_path, project_name="Arm", **answers)
    with_wandb = answers["logger"] == "wandb" and importlib.util.find_spec("wandb") is not None
    environment = {"WANDB_MODE": "offline", "DOPR_HOME": str(tmp_path / "home"), "CI": ""}

    said = run(project, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", **environment)
    assert re.search(r"\d+ passed" if with_wandb or answers["logger"] != "wandb" else r"\d+ skipped", said), said

    small = [*SMALL, *demonstrations(answers, project, environment)]
    if answers["logger"] == "wandb" and not with_wandb:
        small += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]
    configs = [f"--config=configs/{name}.yaml" for name in ("experiment", "debug")]

    # On two processes, as configs/trainer.yaml has it where it has several, and then on from there.
    two = [
        "--config=configs/trainer.yaml",
        "--config=configs/dopr.yaml",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
    ]
    two += ["--trainer.precision=32-true", "--trainer.num_nodes=1", "--checkpoint.dirpath=checkpoints"]
    two += ["--rollout.report_episodes=2"]
    several = answers["trainer"] not in ("cpu", "gpu")
    if not several:
        two += ["--trainer.strategy=ddp"]
    fit = ["-m", "arm", "fit", *configs, *two, *small]
    said = run(project, *fit, "--trainer.max_steps=2", **environment)
    last = project / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    if several:  # on one process the project's own test goes on from a checkpoint
        said = run(project, *fit, "--trainer.max_steps=4", f"--ckpt_path={last}", **environment)
        assert torch.load(last, weights_only=True)["global_step"] == 4
    assert "on 2 x cpu" in said
    assert ("in 2 rollouts" in said) == (answers["task"] != "own")

    # As `make sweep`, with little of everything; without muP in one project.
    if not answers["mup"] and answers["trainer"] != "gpu":
        return
    kind, widths, rates = ("mup", "8,16", "1e-3") if answers["mup"] else ("standard", "16", "1e-4,1e-3")
    sweep = ["sweep", *configs, "--config=configs/sweep.yaml", f"--optimizer=dopr-{answers['base']}", *small]
    sweep += [f"--widths={widths}", f"--learning-rates={rates}", "--seeds=0", f"--parametrizations={kind}"]
    run(project, "-m", "arm", *sweep, "--trainer.max_steps=2", "--output=runs/sweep", "--workers=1", **environment)
    results = json.loads((project / "runs/sweep/results.json").read_text())
    assert (results["recommended"] is not None) == answers["mup"]
    assert len(results["trials"]) == 2
    assert results["identity"]["classes"] == {"policy": "arm.module.Policy", "data": "arm.data.Data"}
    if answers["mup"] and answers["network"] != "mlp":  # of an MLP the library's own tests train what is recommended
        narrow = ["--mup.from_sweep=runs/sweep", "--trainer.max_steps=2", "--checkpoint.dirpath=recommended"]
        narrow += ["--rollout.report_episodes=2"]
        run(project, "-m", "arm", "fit", *configs, "--config=configs/dopr.yaml", *small, *narrow, **environment)
        kept = torch.load(project / "recommended" / "last.ckpt", weights_only=True)
        assert kept["hyper_parameters"]["optimizer"]["lr"] == results["recommended"]["lr"]


class Still(Source):
    """Four episodes whose observations are 0 but for the first step's, so that what is seen is the noise."""

    environment = None

    def load(self) -> Demonstrations:
        seen = np.zeros((48, 2))
        seen[::12] = 1
        return Demonstrations(seen, seen, np.arange(12, 49, 12), "still")


class Watching(L.LightningModule):
    """Notes the observations of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["observation"].clone())
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_every_micro_batch_has_its_own_noise_and_has_it_again_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bake(tmp_path, project_name="Noisy", task="pusht") / "src"))
    module = importlib.import_module("noisy.data")

    def fit(resume: Path | None = None) -> tuple[list[torch.Tensor], Any]:
        model, data = Watching(), module.Data(source=Still(), noise=0.1, batch_size=6)
        statistics, data.asked = data.statistics, 0

        def counted() -> Any:
            data.asked += 1
            return statistics()

        data.statistics = counted
        keep_all = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = L.Trainer(
            max_epochs=2,
            accumulate_grad_batches=2,
            accelerator="cpu",
            callbacks=keep_all,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=resume and True)
        return model.seen, data

    whole, data = fit()
    assert len(whole) == 12  # six batches, three steps an epoch
    assert data.asked == 1
    assert len({str(seen.tolist()) for seen in whole}) == 12
    noise = [seen[0, 0] - seen[0, 0].round() for seen in whole]
    assert all(not torch.allclose(noise[2 * step], noise[2 * step + 1], atol=1e-6) for step in range(6))
    for steps in (1, 3, 4):
        rest, _ = fit(resume=tmp_path / f"step={steps}.ckpt")
        assert all(torch.equal(*pair) for pair in zip(rest, whole[2 * steps :], strict=True)), steps


def demonstrations(answers: dict[str, Any], project: Path, environment: dict[str, str]) -> list[str]:
    """What the Makefile puts in place, smaller."""
    if answers["task"] == "own":
        run(project, "-m", "arm.example", "demonstrations.npz")
        return []
    if answers["task"] == "gymnasium":
        return ["--data.source.init_args.episodes=3"]
    if answers["task"] == "robomimic":
        run(project, "-m", "arm", "demos", "lift", "--scripted=7", **environment)
        return ["--data.validation_episodes=1"]
    from shared_data import shared_data

    archive = shared_data("pusht/pusht_cchi_v7_replay.zarr.zip")
    run(project, "-m", "arm", "demos", "pusht", f"--path={archive}", **environment)
    return []
