"""What went wrong, said to a person: one line that names the thing and the way out."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
from collections.abc import Iterable
from pathlib import Path
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


def one_line(said: object) -> str:
    """A text, an exception's say, without its line breaks."""
    return " ".join(str(said).split())


def missing(path: Path) -> str:
    """Why a path is no file: ``"no such file"``, or that a folder is there."""
    return "a folder, not a file" if path.is_dir() else "no such file"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean batch_size?"``, or nothing if none of them is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def is_remote(place: str | Path) -> bool:
    """Whether a place is on a remote store (``s3://...``), where Lightning can read and write, and we cannot."""
    return "://" in str(place)


def output_folder(text: str) -> Path:
    """Where results will be written: an argument's type, which refuses what they could not be written to.

    Raises:
        UserError: It is on a remote store, a file is in the way, or nothing may be written there.
    """
    if is_remote(text):
        raise UserError(f"{text}: results are written to local files; choose a local folder")
    path = Path(text)
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{path}: {there} is a file, and a folder is needed; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path}: nothing may be written in {there}; choose another folder")
    return path


def output_file(text: str) -> Path:
    """A file to be written, which may be there: as `output_folder`.

    Raises:
        UserError: It is on a remote store or a folder, or its own folder will not do.
    """
    if is_remote(text):
        raise UserError(f"{text}: a local file is written; choose another")
    path = Path(text)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    output_folder(str(path.parent))
    return path


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message}; see: {self.prog} --help")
