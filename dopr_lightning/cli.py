"""``dopr``: one command for training, comparing and preparing data. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

from dopr_lightning.errors import UserError, did_you_mean, one_line
from dopr_lightning.project import LIBRARY, Project

HELP = """\
usage: {command} VERB [options]     ({command} VERB --help explains each, with an example)

Train a policy and judge it by rollouts:
  fit        train:     {command} fit --config walker2d.yaml --config dopr.yaml
  validate   held-out loss and rollouts of a checkpoint, on the seeds that choose checkpoints
  test       the same on the seeds that are reported: {command} test --ckpt last.ckpt

Find out whether an optimizer helps:
  compare    one task under several optimizers, equal budget and seeds: a table, results.json and a plot

Tune narrow, train wide:
  sweep        widths x learning rates, weight decays, damping: best values, drift, regret, and a wide run's YAML
  coord-check  do updates and activations keep their size over widths? Exit status 1 if not

Find out what it costs:
  bench      a step with and without it, measured here; or predicted for a model, ranks and GPUs you do not have yet

Start a project of your own:
  new        {command} new my-robot: policy, data, configurations and tests to edit, around this library

Prepare data:
  demos      check and register demonstrations, downloading them where needed

A configuration file is looked for here first, then among those that come with the package; they stack:
{configs}
"""


WAYS_ON = {
    "fit": "; go on from its last checkpoint by --ckpt_path",
    "compare": "; the same command resumes where a checkpoint was saved",
    "sweep": "; the same command resumes where a checkpoint was saved",
}
"""After an interruption; the other verbs begin anew."""


def main(argv: Sequence[str] | None = None, project: Project = LIBRARY) -> int:
    """Run a verb; a user's mistake becomes one line on stderr and exit status 2.

    With ``main(project=Project(policy=Policy))`` every verb trains your own policy.

    Set ``DOPR_TRACEBACK=1`` to see where an error came from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        from dopr_lightning.configs import available

        print(HELP.format(command=project.command, configs=_listed(available())))
        return 0
    verb, *rest = arguments
    if verb == "--version":
        from dopr_lightning import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS) or ";"
        print(f"{project.command}: unknown verb {verb!r}{hint} choose from {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](verb, rest, project) or 0
    except (KeyboardInterrupt, SystemExit) as error:
        # The trainer makes one of the other.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print(f"{project.command}: interrupted{WAYS_ON.get(verb, '')}", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("DOPR_TRACEBACK") or not _is_users(error):
            raise
        print(f"{project.command}: error: {one_line(_said(error))}", file=sys.stderr)
        return 2


def _listed(names: Sequence[str]) -> str:
    """Configuration files in lines: tasks and optimizers, then where to train."""
    trainers = [name for name in names if name.startswith("trainer/")]
    parts = ([name for name in names if name not in trainers], trainers)
    return "\n".join(
        textwrap.fill(", ".join(part), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        for part in parts
    )


def _is_users(error: Exception) -> bool:
    """Whether an exception speaks to the user: ours, and what libraries raise for bad values, files and settings."""
    return isinstance(error, UserError | ValueError | OSError) or type(error).__name__ == "MisconfigurationException"


def _said(error: Exception) -> str:
    said = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:  # its own text begins with a number
        said = f"{error.filename}: {error.strerror}"
    return "; ".join([said, *getattr(error, "__notes__", [])])  # notes say what became of the training


def _train(verb: str, arguments: list[str], project: Project) -> None:
    from dopr_lightning.training import run

    run(verb, arguments, project)


def _judge(verb: str, arguments: list[str], project: Project) -> None:
    if any(argument.partition("=")[0] == "--ckpt" for argument in arguments):
        from dopr_lightning.evaluation import run

        run(verb, arguments, project.command)  # the checkpoint says whose classes it is of
    else:
        _train(verb, arguments, project)


def _run_main(module: str, verb: str, arguments: list[str], project: Project) -> int | None:
    return importlib.import_module(module).main(arguments, project)


VERBS: dict[str, Callable[[str, list[str], Project], int | None]] = {
    "fit": _train,
    "validate": _judge,
    "test": _judge,
    "compare": partial(_run_main, "dopr_lightning.experiments.compare"),
    "sweep": partial(_run_main, "dopr_lightning.experiments.sweep.main"),
    "coord-check": partial(_run_main, "dopr_lightning.experiments.coordinate_check"),
    "bench": partial(_run_main, "dopr_lightning.bench.main"),
    "demos": partial(_run_main, "dopr_lightning.data.demos"),
    "new": partial(_run_main, "dopr_lightning.new"),
}
