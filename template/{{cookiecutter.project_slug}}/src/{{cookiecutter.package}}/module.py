"""The policy: what is trained, and what is said about it on the way."""

import torch
from dopr_lightning.policies.module import Batch, PolicyModule


class Policy(PolicyModule):
    """{{ {"flow": "Flow matching", "diffusion": "Diffusion", "regression": "Regression"}[cookiecutter.policy] }} from observations to chunks of actions.

    `PolicyModule` brings the normaliser, the loss, the sampler, the optimizer with its schedule, and checkpoints.
    Change any of it here, as in every LightningModule: override `training_step` for another loss,
    `configure_optimizers` for other groups, `predict` for what is done with a chunk. Arguments that you add to
    `__init__` can be set in configs/ and on the command line. The network is named in configs/experiment.yaml.
    """

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss; and as `val/action_error` how far actions of the first batch are off, in their own units."""
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            noise = [torch.Generator().manual_seed(window) for window in range(len(batch["action"]))]
            chosen = self.predict(batch["observation"], noise)
            first = self.observe - 1  # the chunk begins with the oldest observation
            error = (chosen - batch["action"][:, first : first + self.act]).abs().mean()
            self.log("val/action_error", error, sync_dist=True)
