"""What do Lightning and torch's gradient scaler say in no public way? Where to look when a new version breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import BatchSizeFinder, StochasticWeightAveraging
    from torch.amp import GradScaler
    from torch.optim import Optimizer

_PACKAGES = frozenset({"lightning", "pytorch_lightning"})


def is_lightnings(thing: object, *names: str) -> bool:
    """Whether it is of a class of Lightning's, by name: ``pytorch_lightning`` has classes of its own."""
    return any(kind.__name__ in names and kind.__module__.split(".")[0] in _PACKAGES for kind in type(thing).__mro__)


def steps_logged(trainer: Trainer) -> int:
    """The x axis of all that Lightning logs: batches that ended with a step, whatever the number of optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def skips_backward(trainer: Trainer) -> bool:
    """Whether training steps run without backward passes, as when weight averaging renews its batch norms."""
    return trainer.fit_loop._skip_backward


def finds_batch_size(callback: BatchSizeFinder) -> bool:
    """Whether training goes on after its search: the Tuner's own finder ends with it."""
    return not callback._early_exit


def averaging_rates(callback: StochasticWeightAveraging) -> float | list[float]:
    """The learning rates that it anneals to: one for all groups, or one for each."""
    return callback._swa_lrs


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """Where the processes were launched."""
    return trainer._accelerator_connector.cluster_environment


def preempted_checkpoint(trainer: Trainer) -> str | None:
    """The checkpoint of a preemption under SLURM that Lightning goes on from, if none is named."""
    return trainer._checkpoint_connector._hpc_resume_path


def next_preempted_checkpoint(trainer: Trainer) -> str:
    """Where the next such checkpoint goes."""
    return trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)


def will_skip(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether the scaler found infinities when it unscaled, and so will not let the optimizer step."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: Lightning leaves unscaling to its step
        scaler._check_inf_per_device(optimizer)
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    return any(bool(value) for value in found.values())
