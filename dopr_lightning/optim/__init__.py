"""Base optimizers: one composite Optimizer for a whole model, parameter roles, schedules."""

from dopr_lightning.optim.bases import BASES, Base
from dopr_lightning.optim.composite import CompositeOptimizer
from dopr_lightning.optim.configure import configure_optimizers, make_optimizer
from dopr_lightning.optim.roles import parameter_roles
from dopr_lightning.optim.schedules import make_scheduler
from dopr_lightning.optim.table import mup_table

__all__ = [
    "BASES",
    "Base",
    "CompositeOptimizer",
    "configure_optimizers",
    "make_optimizer",
    "make_scheduler",
    "mup_table",
    "parameter_roles",
]
