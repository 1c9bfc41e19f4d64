"""Train the policy: python -m {{ cookiecutter.package }}.train fit --help."""

import sys

from dopr_lightning import DoPr
from dopr_lightning.errors import UserError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from {{ cookiecutter.package }}.data import Demonstrations
from {{ cookiecutter.package }}.module import Policy


class CLI(LightningCLI):
    """LightningCLI with DoPr, and with the policy's sizes taken from the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(DoPr, "dopr")
        parser.set_defaults({"dopr.damping": {{ cookiecutter.damping|float }}})
        for dim in ("observation_dim", "action_dim"):
            parser.link_arguments(f"data.{dim}", f"model.{dim}", apply_on="instantiate")


def main() -> CLI:
    try:
        return CLI(
            Policy,
            Demonstrations,
            seed_everything_default=0,
            trainer_defaults={"max_epochs": 100, "log_every_n_steps": 10},
            auto_configure_optimizers=False,
        )
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
