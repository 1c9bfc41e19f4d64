"""What does a sweep over widths say of a wide run? Its results.json, read when a configuration names the folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dopr_lightning.configuration import differences
from dopr_lightning.errors import UserError

FLAG = "--mup.from_sweep"
RESULTS = "results.json"
OVERLAY = "recommended.yaml"

SETS = (
    "model.mup",
    "model.optimizer.lr",
    "model.optimizer.lr_by_role",
    "model.optimizer.weight_decay",
    "trainer.callbacks.damping",
)
"""Settings whose values the sweep gives."""

STEPPING = {"accumulate_grad_batches": 1, "gradient_clip_algorithm": "norm"}
"""Options of the trainer that change what a step is, and their defaults."""

LINKED = ("observation_dim", "action_dim", "observe", "horizon", "act")
"""What a policy takes from the data."""


def identity(config: Mapping[str, Any], scales: Sequence[str]) -> dict[str, Any]:
    """What must be the same in a narrow and a wide run for the one's hyperparameters to suit the other.

    The task, the network but for its width, the objective, the optimizer's kind, DoPr's options. Not the number of
    steps, nor the warm-up that goes with it.

    Args:
        config: A whole configuration, as plain values.
        scales: The network's keywords that scale with its width.
    """
    model, network, dopr = config["model"], config["model"]["network"], dopr_of(config)
    stepping = {key: config["trainer"].get(key) for key in STEPPING}
    return {
        "classes": config.get("classes", {}),
        "data": _without(config["data"], "seed", "num_workers"),
        # Whatever else the policy's class has: the algorithm, the normalisers, a subclass's own.
        "model": _without(model, "seed", "mup", *LINKED)
        | {
            "network": {
                "class_path": network["class_path"],
                "init_args": _without(network.get("init_args", {}), *scales),
            },
            "optimizer": _without(model["optimizer"], "lr", "weight_decay", "lr_by_role", "warmup_steps"),
        },
        "trainer": {
            "gradient_clip_val": config["trainer"].get("gradient_clip_val"),
            "callbacks": "no DoPr" if dopr is None else "DoPr",
            "dopr": _without(dopr or {}, "damping", "log_every"),
        }
        # Older results have none of these, and mean the same.
        | {key: value for key, value in stepping.items() if value not in (None, STEPPING[key])},
    }


def dopr_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """DoPr's arguments in a configuration that has it as its last callback; None without it.

    Raises:
        UserError: DoPr is there, and is not the last.
    """
    callbacks = config["trainer"].get("callbacks") or []
    found = [index for index, callback in enumerate(callbacks) if callback["class_path"].rpartition(".")[2] == "DoPr"]
    if not found:
        return None
    if found != [len(callbacks) - 1]:
        raise UserError("list DoPr once, as the last of trainer.callbacks: its damping is set from outside")
    return callbacks[-1].get("init_args", {})


def recommended(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that a sweep found for runs of ``config`` at any width.

    Args:
        folder: The sweep's ``--output``.
        config: The whole configuration of the wide run, as plain values.

    Returns:
        ``{"lr": ..., "weight_decay": ..., "lr_by_role": {...}, "damping": ... or None, "mup": {"base": ...,
        "weight_decay": ...}}``

    Raises:
        UserError: There is no sweep, it found nothing, or it is of another configuration.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise UserError(f"{FLAG} {folder}: no {RESULTS} there; give the --output of a finished dopr sweep")
    results = json.loads(path.read_text())
    if "recommended" not in results:
        raise UserError(f"{FLAG} {folder}: its {RESULTS} is not of a dopr sweep")
    found = results["recommended"]
    if found is None:
        raise UserError(f"{FLAG} {folder}: this sweep recommends nothing: no width trained under muP")
    changed = differences(results["identity"], identity(config, results["scales"]))
    if changed:
        raise UserError(
            f"{FLAG} {folder}: that sweep was of another configuration ({changed}); mend this one, or put the "
            f"sweep's own before it and keep {FLAG}, so that your width and schedule win: --config {folder / OVERLAY} "
            "--config YOURS"
        )
    network = config["model"]["network"]["init_args"]
    for key, base in found["mup"]["base"].items():
        if len(sizes(network[key])) != len(sizes(base)):
            raise UserError(
                f"{FLAG} {folder}: {key} {network[key]} has not as many entries as the sweep's base, {base}"
            )
        if any(size < least for size, least in zip(sizes(network[key]), sizes(base), strict=True)):
            raise UserError(
                f"{FLAG} {folder}: {key} {network[key]} is narrower than the sweep's base, {base}; widen it"
            )
    if ends := grid_ends(found):
        warnings.warn(f"{FLAG} {folder}: {ends}", stacklevel=2)
    shares = found.get("lr_by_role", {})  # older results say nothing of it, which was 1 for all
    return {key: found[key] for key in ("lr", "weight_decay", "damping", "mup")} | {"lr_by_role": shares}


def grid_ends(found: Mapping[str, Any]) -> str:
    """Which recommended values lie at an end of their grid, in a line; empty if none does. Older results do not say.

    Args:
        found: The results' ``"recommended"``.
    """
    ends = ", ".join(f"{name} {found[name]:g}" for name in found.get("at_edge", []))
    return f"{ends}: at the grid's end, so better may lie beyond; sweep a wider grid" if ends else ""


def refuse_given(args: Sequence[str]) -> None:
    """Refuse arguments of ``dopr fit`` that say what the sweep says, each in any of its forms.

    Raises:
        UserError: Names the option.
    """
    for arg, following in pairwise((*args, "")):
        flag, equals, value = arg.partition("=")
        if not flag.startswith("--"):
            continue
        option = _plain_name(flag.removeprefix("--"))
        for name in (option, *_named(option, value if equals else following)):
            if any(f"{name}.".startswith(f"{ours}.") for ours in SETS):
                within = "" if name == option else f", which sets {name},"
                raise UserError(
                    f"{flag}{within} and {FLAG} say the same thing; leave one out, or change the sweep's {OVERLAY} and "
                    "stack that"
                )


def _named(name: str, value: Any, folder: Path = Path()) -> Iterator[str]:
    """Dotted names of all that a value of ``name`` sets: a mapping, a list of them, or a file that holds one.

    Args:
        name: Dotted, without what says only where in a list.
        value: As given, on the command line or in a file.
        folder: Of that file: what is named in it is relative to it.
    """
    # Other options may name files that hold no configuration, and are large.
    if isinstance(value, str) and any(ours.startswith(f"{name}.") for ours in SETS):
        value, folder = _loaded(value, folder)
    if not isinstance(value, dict | list) or not value:
        yield name
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _named(_plain_name(f"{name}.{key}"), inner, folder)


def _loaded(text: str, folder: Path) -> tuple[Any, Path]:
    """A text as YAML, or that of the file it names; and the folder of files that are named in it."""
    path = folder / text
    if os.path.isfile(path):  # not is_file(), which raises where a mapping is too long for a name
        text, folder = path.read_text(), path.parent
    try:
        return yaml.safe_load(text), folder
    except (yaml.YAMLError, ValueError):  # it may be anything: a date that there is not
        return None, folder


def _plain_name(key: str) -> str:
    """Without what says only where in a list of classes: ``trainer.callbacks+.0.init_args.damping``."""
    return ".".join(part for part in key.replace("+", "").split(".") if part != "init_args" and not part.isdigit())


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def sizes(value: Any) -> Sequence[int]:
    """Those that a scaled keyword names: it holds one, or a list."""
    return value if isinstance(value, list) else [value]
