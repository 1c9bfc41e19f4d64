{%- set c = cookiecutter -%}
{%- set recorded = c.task in ("own", "gymnasium") -%}
"""What a batch holds{{ ", and which files are refused" if recorded }}."""
{% if recorded %}
from pathlib import Path
{%- endif %}
from types import SimpleNamespace
from typing import cast

import numpy as np
{%- if recorded %}
import pytest
{%- endif %}
import torch
{%- if recorded %}
from dopr_lightning.errors import UserError
{%- else %}
from dopr_lightning.data import Demonstrations, Source
{%- endif %}
from dopr_lightning.policies.module import Batch
from lightning import Trainer

from {{ c.package }}.data import Data{{ ", Recorded" if recorded }}

RNG = np.random.default_rng(0)
ARRAYS = {
    "observations": 5 * RNG.standard_normal((60, 3)),
    "actions": RNG.standard_normal((60, 2)),
    "episode_ends": np.array([20, 40, 60]),
}

{% if recorded %}
@pytest.fixture
def source(tmp_path: Path) -> Recorded:
    """Three episodes in a file."""
    np.savez(tmp_path / "demonstrations.npz", **ARRAYS)
    return Recorded(str(tmp_path / "demonstrations.npz"){{ ', "Walker2d-v5"' if c.task == "gymnasium" }})


def test_the_file_is_read(source: Recorded) -> None:
    read = source.load()
    assert np.allclose(read.observations, ARRAYS["observations"])
    assert np.allclose(read.actions, ARRAYS["actions"])
    assert read.num_episodes == 3
    np.savez(source.path, **ARRAYS, notes=np.array([{"by": "hand"}]))  # what else is there is not read
    assert source.load().num_episodes == 3


def test_bad_files_are_named(source: Recorded) -> None:
    whole = Path(source.path).read_bytes()
    for broken in (whole[: len(whole) // 2], b"something else"):
        Path(source.path).write_bytes(broken)
        with pytest.raises(UserError, match=r"demonstrations\.npz: damaged, or no \.npz file"):
            source.load()
    np.savez(source.path, observations=ARRAYS["observations"], actions=ARRAYS["actions"])
    with pytest.raises(UserError, match="lacks episode_ends"):
        source.load()
    Path(source.path).unlink()
    with pytest.raises(UserError, match="no such file"):
        source.load()

{% if c.task == "own" %}
def test_the_environment_may_come_later(source: Recorded) -> None:
    assert source.environment is None
    named = Recorded(source.path, env_id="Walker2d-v5", max_steps=50).environment
    assert named is not None
    assert (named.id, named.max_steps) == ("Walker2d-v5", 50)

{% endif %}
{%- else %}
class Three(Source):
    """Three episodes."""

    @property
    def environment(self) -> None:
        return None

    def load(self) -> Demonstrations:
        return Demonstrations(**ARRAYS, source="three")

{% endif %}
def test_noise_is_for_training_alone_and_comes_again_with_its_batch({{ "source: Recorded" if recorded }}) -> None:
    data = Data(source={{ "source" if recorded else "Three()" }}, noise=0.1, batch_size=16)
    batch = next(iter(data.train_dataloader()))

    def seen(training: bool, epoch: int = 0, before: int = -1) -> torch.Tensor:
        loop = SimpleNamespace(batch_idx=before)
        at = SimpleNamespace(training=training, global_rank=0, current_epoch=epoch, fit_loop=loop)
        data.trainer = cast(Trainer, at)
        noisy: Batch = data.on_after_batch_transfer(batch, 0)
        assert torch.equal(noisy["action"], batch["action"])
        return noisy["observation"] - batch["observation"]

    assert not seen(training=False).any()
    assert 0.2 < seen(training=True).std() < 0.8  # a tenth of 5
    assert torch.equal(seen(training=True), seen(training=True))
    assert not torch.equal(seen(training=True), seen(training=True, before=0))
    assert not torch.equal(seen(training=True), seen(training=True, epoch=1))
