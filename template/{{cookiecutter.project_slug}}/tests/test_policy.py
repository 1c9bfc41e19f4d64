{%- set c = cookiecutter -%}
"""The project's policy trains on its data, goes on from a checkpoint{{ "" if c.task == "own" else ", and is judged by rollouts" }}."""

from pathlib import Path

import pytest
import torch
from conftest import Run

from {{ c.package }}.module import Policy


def steps(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def test_it_trains_and_goes_on_from_a_checkpoint(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("fit", "--trainer.max_steps=2")
    last = folder / "checkpoints" / "last.ckpt"
    assert steps(last) == 2
{%- if c.task != "own" %}
    assert "in {{ "1 rollout " if c.task == "robomimic" else "2 rollouts " }}" in capsys.readouterr().out
{%- endif %}

    run("fit", "--trainer.max_steps=4", f"--ckpt_path={last}")
    assert steps(last) == 4

    # It says how far its actions are off: not at all when asked for what it does, by one when asked for one more.
    policy = Policy.load_from_checkpoint(last).eval()
    seen = torch.zeros(3, policy.observe, policy.observation_dim)
    chosen = policy.predict(seen, [torch.Generator().manual_seed(window) for window in range(3)])
    assert chosen.shape == (3, policy.act, policy.action_dim)
    wanted = torch.zeros(3, policy.horizon, policy.action_dim)
    wanted[:, policy.observe - 1 : policy.observe - 1 + policy.act] = chosen
    logged: dict[str, float] = {}
    monkeypatch.setattr(policy, "log", lambda name, value, **_: logged.update({name: value.item()}))
    for off in (0.0, 1.0):
        policy.validation_step({"observation": seen, "action": wanted + off}, 0)
        assert logged["val/action_error"] == pytest.approx(off, abs=1e-5)
