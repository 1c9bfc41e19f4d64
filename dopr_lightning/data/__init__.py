"""Demonstrations to learn from: where they come from, and how they become batches.

A `Source` reads `Demonstrations` and names the environment they were given in; `dopr_lightning.data.module` cuts
them into windows and batches. Importing the sources here lets a configuration say ``source: PushT``.
"""

from dopr_lightning.data.convention import Convention
from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.experts import BuiltinExpert
from dopr_lightning.data.minari_source import Minari
from dopr_lightning.data.pusht import PushT
from dopr_lightning.data.source import Source

__all__ = ["BuiltinExpert", "Convention", "Demonstrations", "EnvironmentSpec", "Minari", "PushT", "Source"]
