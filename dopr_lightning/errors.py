"""What went wrong, said to a person: one line that names the thing and the way out."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import NoReturn


class UserError(Exception):
    """A mistake the user can mend. The command line prints it as one line, without a stack trace."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: The module to import, ``"gym_pusht"`` say.
        extra: The extra of ``dopr-lightning`` that installs it, ``"pusht"`` say.

    Raises:
        UserError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name or module} is not installed; run: pip install 'dopr-lightning[{extra}]'"
        ) from error


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message}; see: {self.prog} --help")
