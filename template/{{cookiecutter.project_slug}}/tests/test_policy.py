{%- set c = cookiecutter -%}
"""The project's policy trains on its data, goes on from a checkpoint{{ "" if c.task == "own" else ", and is judged by rollouts" }}."""

from pathlib import Path

import pytest
import torch
{%- if c.logger == "wandb" %}

pytest.importorskip("wandb")
{%- endif %}
from conftest import Run

from {{ c.package }}.module import Policy


def steps(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def test_it_trains_and_goes_on_from_a_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("fit", "--trainer.max_steps=2")
    last = folder / "checkpoints" / "last.ckpt"
    assert steps(last) == 2
{%- if c.task != "own" %}
    assert "rollout/" in capsys.readouterr().out
{%- endif %}

    run("fit", "--trainer.max_steps=4", f"--ckpt_path={last}")
    assert steps(last) == 4

    run("validate", f"--ckpt_path={last}")
    assert "val/action_error" in capsys.readouterr().out
    policy = Policy.load_from_checkpoint(last)
    chunk = policy.eval().predict(torch.zeros(3, policy.observe, policy.observation_dim), [torch.Generator()] * 3)
    assert chunk.shape == (3, policy.act, policy.action_dim)
    assert chunk.isfinite().all()
