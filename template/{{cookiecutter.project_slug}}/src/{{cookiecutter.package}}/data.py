{%- set recorded = cookiecutter.task in ("own", "gymnasium") -%}
"""The demonstrations: {{ "where they come from, and " if recorded }}what a batch of them holds."""
{% if recorded %}
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError
from dopr_lightning.policies.module import Batch


class Recorded(Source):
    """Demonstrations in an .npz file, episode after episode.

    It holds `observations` (steps, numbers) and `actions` (steps, numbers), a row for each step: what was seen, and
    what was done there; and `episode_ends` (episodes,): for each episode, the number of the step after its last.

    Args:
        path: The file.
{%- if cookiecutter.task == "own" %}
        env_id: Gymnasium id of the environment that policies are judged in; None as long as there is none.
        env_module: The module that registers the id on import, if it is not Gymnasium's own.
        max_steps: Longest episode, in steps of the environment.
{%- else %}
        env_id: Gymnasium id of the environment they were recorded in.
        max_steps: Longest episode, in steps of the environment.
        env_module: The module that registers the id on import, if it is not Gymnasium's own.
{%- endif %}
        metric: What an episode is worth: `return`, the sum of its rewards; `max_reward`, the best of them; `success`,
            1 if `is_success` in the environment's info ever held, else 0; failures are to be reported there too.
    """

    def __init__(
        self,
        path: str,
{%- if cookiecutter.task == "own" %}
        env_id: str | None = None,
        env_module: str | None = None,
        max_steps: int = 200,
{%- else %}
        env_id: str,
        max_steps: int = 1000,
        env_module: str | None = None,
{%- endif %}
        metric: Literal["return", "max_reward", "success"] = "return",
    ) -> None:
        self.path = path
        self.env_id = env_id
        self.env_module = env_module
        self.max_steps = max_steps
        self.metric = metric

    @property
{%- if cookiecutter.task == "own" %}
    def environment(self) -> EnvironmentSpec | None:
        if self.env_id is None:
            return None
        return EnvironmentSpec(self.env_id, self.max_steps, self.metric, module=self.env_module)
{%- else %}
    def environment(self) -> EnvironmentSpec:
        return EnvironmentSpec(self.env_id, self.max_steps, self.metric, module=self.env_module)
{%- endif %}

    def load(self) -> Demonstrations:
        path = Path(self.path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; README.md says how to write one")
        wanted = {"observations", "actions", "episode_ends"}
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in wanted & set(file)}
        except Exception as error:  # a file may be broken in any way
            raise UserError(f"{path}: damaged, or no .npz file ({error}); README.md says how to write one") from error
        if missing := wanted - set(arrays):
            raise UserError(f"{path}: lacks {', '.join(sorted(missing))}; README.md says what it holds")
        return Demonstrations(arrays["observations"], arrays["actions"], arrays["episode_ends"], source=self.path)
{% else %}
from functools import cached_property
from typing import Any

import numpy as np
import torch
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.policies.module import Batch
{% endif %}

class Data(DemonstrationData):
    """Windows of demonstrations.

    Args:
        noise: Standard deviation of noise on the observations in training, relative to that of the demonstrations. A
            little of it shows the policy states beside the demonstrated ones, where its own errors will take it.
        arguments: Of `DemonstrationData`: source, batch_size, observe, horizon, act, validation_episodes, ...
    """

    def __init__(self, noise: float = 0.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.noise = noise

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """What happens to a batch on its way to the policy, on the policy's device."""
        if not self.noise or self.trainer is None or not self.trainer.training:
            return batch
        seen = batch["observation"]
        # Seeded by run, process, epoch and batch, so that a resumed run sees what the uninterrupted one saw. Lightning
        # counts this batch when it is here: the latest is still the one before, -1 at first.
        stream = (self.seed, self.trainer.global_rank, self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(stream).generate_state(1)[0]))
        noise = torch.randn(seen.shape, generator=generator).to(seen)
        self._std = self._std.to(seen)  # moved once
        return {**batch, "observation": seen + self.noise * self._std * noise}

    @cached_property
    def _std(self) -> torch.Tensor:
        return self.statistics()["observation"]["std"]
