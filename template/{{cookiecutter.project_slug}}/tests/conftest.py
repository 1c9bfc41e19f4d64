{%- set c = cookiecutter -%}
"""What every test needs: to run the project's own command, quickly."""

from collections.abc import Callable
from pathlib import Path
{% if c.task == "pusht" %}
import numpy as np
{%- endif %}
import pytest
from dopr_lightning.cli import main
{%- if c.task == "pusht" %}
from dopr_lightning.data import Demonstrations, EnvironmentSpec, PushT, Source
{%- endif %}

from {{ c.package }}.__main__ import PROJECT
{%- if c.task == "own" %}
from {{ c.package }}.example import write
{%- endif %}

CONFIGS = Path(__file__).parents[1] / "configs"

Run = Callable[..., Path]
{% if c.task == "pusht" %}

class Tiny(Source):
    """Random walks in PushT's arena: the tests need no download."""

    @property
    def environment(self) -> EnvironmentSpec:
        return PushT().environment

    def load(self) -> Demonstrations:
        rng = np.random.default_rng(0)
        states, actions = rng.uniform(0, 512, (240, 5)), rng.uniform(0, 512, (240, 2))
        return Demonstrations(states, actions, np.arange(30, 241, 30), "tiny")
{% elif c.task == "robomimic" %}

@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scripted demonstrations, recorded for the tests."""
    file = tmp_path_factory.mktemp("demonstrations") / "lift.hdf5"
    assert main(["demos", "lift", "--scripted", "3", "--output", str(file)]) == 0
    return file
{% elif c.task == "own" %}

@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, smaller."""
    file = tmp_path_factory.mktemp("demonstrations") / "demonstrations.npz"
    write(file, episodes=8, steps=20)
    return file
{% endif %}

@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch{{ ", demonstrations: Path" if c.task in ("own", "robomimic") }}) -> Run:
    """A verb on the experiment, cut down to a few steps on a CPU; returns the folder that it runs in."""
    monkeypatch.chdir(tmp_path)
    {%- if c.logger == "wandb" %}
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    {%- endif %}
    small = [
        f"--config={CONFIGS / 'experiment.yaml'}",
        f"--config={CONFIGS / 'debug.yaml'}",
        f"--config={CONFIGS / 'dopr.yaml'}",
{%- if c.task == "gymnasium" %}
        "--data.source.init_args.episodes=3",
{%- elif c.task == "pusht" %}
        "--data.source=conftest.Tiny",
{%- else %}
        f"--data.source.init_args.path={demonstrations}",
{%- endif %}
        "--data.validation_episodes=1",
        "--data.batch_size=8",
        "--model.optimizer.schedule=constant",
        "--model.optimizer.warmup_steps=0",
        "--checkpoint.dirpath=checkpoints",
        "--rollout.episodes=0",
        "--rollout.report_episodes={{ 1 if c.task == "robomimic" else 2 }}",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
    ]

    def fit(verb: str, *options: str) -> Path:
        assert main([verb, *small, *options], PROJECT) == 0
        {%- if c.logger == "wandb" %}
        wandb.finish()  # or the next run of this process would be taken for the same one
        {%- endif %}
        return tmp_path

    return fit
