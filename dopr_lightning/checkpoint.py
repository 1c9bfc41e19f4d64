"""What does a checkpoint say of itself? What its policy saw, did, and where; and does that hold here?

The record lies under ``checkpoint["dopr"]``, as plain values, so that it loads with ``weights_only=True``:

    format         1
    config         the whole configuration of ``dopr fit``
    policy         class; observe, horizon, act; modes of the normalisers, whose maps are buffers of the state_dict
    data           class, source, sha256; episodes and steps on both sides of the split, and a digest of which they are
    observation    keys, dim, cameras with height and width of their images
    action         dim, kind (absolute, relative, native), rotation, low and high
    environment    the `EnvironmentSpec`, if there was one
    versions       of Python, of what trained it, and of the environment's simulators
    ema            decay and warmup_power; the state_dict is the average

Beside it lie ``state_dict``, ``mup`` (the `MupSpec`'s shapes), and the state of DoPr and all other callbacks.
"""

from __future__ import annotations

import logging
import platform
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from dopr_lightning.configuration import differences
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError, is_remote, missing, one_line
from dopr_lightning.policies.ema import EMA
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.versions import versions

log = logging.getLogger(__name__)

KEY = "dopr"
FORMAT = 1
LIBRARIES = ("dopr-lightning", "torch", "lightning", "gymnasium")

# How an environment is found and called, and which seeds are asked of it, is no part of what it is.
_ELSEWHERE = ("extra", "module", "first_seed", "simulators", "name")

_SPLIT = ("train_episodes", "train_steps", "validation_episodes", "validation_steps")
_WHICH = "split_sha256"


def describe(
    policy: PolicyModule, data: DemonstrationData, config: Mapping[str, Any], ema: EMA | None
) -> dict[str, Any]:
    """The record.

    Args:
        policy: What is trained.
        data: What it is trained on.
        config: The whole configuration, as plain values.
        ema: The callback that averages the weights, if any.

    Raises:
        UserError: A keyword of the environment, or what the data says of itself, is no plain value.
    """
    convention, spec = data.convention(), data.environment
    simulators = spec.simulators if spec else ()
    return {
        "format": FORMAT,
        "config": _plain(config, "the configuration"),
        "policy": {
            "class": _path(type(policy)),
            "observe": policy.observe,
            "horizon": policy.horizon,
            "act": policy.act,
            "observation_normalizer": policy.observation_normalizer.mode,
            "action_normalizer": policy.action_normalizer.mode,
        },
        "data": _plain({"class": _path(type(data)), **data.provenance}, "what the data says of itself"),
        "observation": {
            "keys": _plain(list(convention.observation_keys), "Convention.observation_keys"),
            "dim": policy.observation_dim,
            "cameras": {camera: list(size) for camera, size in data.image_sizes.items()},
        },
        "action": {
            "dim": policy.action_dim,
            "kind": convention.actions,
            "rotation": convention.rotation,
            "low": None if convention.low is None else _plain(list(convention.low), "Convention.low"),
            "high": None if convention.high is None else _plain(list(convention.high), "Convention.high"),
        },
        "environment": _plain(asdict(spec), f"environment {spec.id!r}") if spec else None,
        "versions": {"python": platform.python_version()} | versions([*LIBRARIES, *simulators]),
        "ema": None if ema is None else {"decay": ema.decay, "warmup_power": ema.warmup_power},
    }


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint with a record; its tensors stay on the disk until they are used.

    Raises:
        UserError: There is no such file, it is something else, or it has no record that this version reads.
    """
    if (Path(path) / ".metadata").is_file():  # of torch.distributed.checkpoint
        raise UserError(
            f"{path} is a folder of shards; join them with: python -m lightning.pytorch.utilities."
            f"consolidate_checkpoint {path}"
        )
    require_file(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a file may be broken in any way
        raise UserError(f"{path}: damaged, or not a checkpoint ({one_line(error)[:100]})") from error
    record = _record_of(checkpoint) if isinstance(checkpoint, dict) else None
    if record is None:
        raise UserError(
            f"{path} does not say which configuration, data and environment it is of: it was not written by dopr fit; "
            f"what still works: --config FILES --ckpt_path {path}, and "
            "PolicyModule.load_from_checkpoint"
        )
    if record["format"] != FORMAT:
        raise UserError(
            f"{path} describes itself in format {record['format']}, and dopr-lightning here reads {FORMAT}; install "
            f"dopr-lightning=={record['versions'].get('dopr-lightning')}"
        )
    return checkpoint


def require_file(path: str | Path, flag: str = "") -> None:
    """Refuse what is no file of ``torch.save``.

    Args:
        path: Of the checkpoint.
        flag: The option that named it, for the message.

    Raises:
        UserError: Says what it is.
    """
    if is_remote(path):
        raise UserError(f"{flag} {path}".lstrip() + ": on a remote store; copy it to a local file first")
    said = f"{flag} {Path(path)}".lstrip()  # nothing, of an unset variable, is this folder
    if not Path(path).is_file():
        raise UserError(f"{said}: {missing(Path(path))}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{said}: damaged, or not a checkpoint")


def environment_of(record: Mapping[str, Any]) -> EnvironmentSpec | None:
    """The environment a checkpoint's policy is judged in; None where there was none yet."""
    if record["environment"] is None:
        return None
    return EnvironmentSpec(**record["environment"])


def class_of(record: Mapping[str, Any], part: str) -> type[Any]:
    """The class of the ``"policy"`` or the ``"data"``.

    Raises:
        UserError: It cannot be imported.
    """
    path = record[part]["class"]
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the checkpoint's {part} is a {path}, which cannot be imported ({error}); install the project it is in, "
            "or run from its folder"
        ) from error


def check_versions(record: Mapping[str, Any], accept: bool) -> None:
    """Compare the environment's simulators with those installed.

    Args:
        record: Of a checkpoint.
        accept: Warn of another version, where it would be refused.

    Raises:
        UserError: A version is another, or the simulator is not installed.
    """
    names = record["environment"]["simulators"] if record["environment"] else ()
    installed = versions(names)
    for name in names:
        here, recorded = installed.get(name), record["versions"].get(name)
        if here == recorded:
            continue
        if here is None:
            extra = record["environment"]["extra"]
            wanted = f"'dopr-lightning[{extra}]'" if extra else f"{name}=={recorded}"
            raise UserError(
                f"{name} is not installed, and the checkpoint's rollouts need it; run: pip install {wanted}"
            )
        said = f"the checkpoint was trained with {name} {recorded}, and here is {here}: its episodes may differ"
        if not accept:
            raise UserError(f"{said}; run: pip install {name}=={recorded}, or go on with --accept_versions true")
        log.warning(said)


def check_data(record: Mapping[str, Any], data: DemonstrationData) -> None:
    """Compare a checkpoint with the demonstrations here.

    Raises:
        UserError: They are others, other episodes of them are held out, or their numbers mean something else.
    """
    there, here = record["data"], data.provenance
    if there["sha256"] != here["sha256"]:
        raise UserError(
            f"the checkpoint was trained on {there['source']} with sha256 {there['sha256'][:12]}, and this is "
            f"{here['source']} with {here['sha256'][:12]}; give the demonstrations that it was trained on"
        )
    recorded = {name: there[name] for name in _SPLIT if name in there and name in here}
    if changed := differences(recorded, {name: here[name] for name in recorded}):
        raise UserError(
            f"the checkpoint was trained on another split ({changed}), and may have seen what is held out here; give "
            "--data.episodes and --data.validation_episodes as they were"
        )
    if _WHICH in there and _WHICH in here and there[_WHICH] != here[_WHICH]:
        raise UserError(
            f"the checkpoint was trained on other episodes of {there['source']} than those here, and may have seen "
            "what is held out; give --data.source the options that it had"
        )
    convention = data.convention()
    _refuse_other("observes", record["observation"]["keys"], list(convention.observation_keys))
    its = record["action"]
    _refuse_other("takes actions that are", (its["kind"], its["rotation"]), (convention.actions, convention.rotation))
    for name, bound in (("low", convention.low), ("high", convention.high)):
        _refuse_other(f"has actions bounded ({name}) by", its[name], None if bound is None else list(bound))


def check_environment(record: Mapping[str, Any], spec: EnvironmentSpec | None) -> None:
    """Compare a checkpoint's environment with another, if both are there: one may come after the training.

    Raises:
        UserError: Names what differs.
    """
    if record["environment"] is None or spec is None:
        return
    if changed := differences(record["environment"], _plain(asdict(spec), "environment"), ignore=_ELSEWHERE):
        raise UserError(
            f"the checkpoint's policy was trained for another environment ({_short(changed)}); give the configuration "
            "that it was trained with"
        )


def _refuse_other(what: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise UserError(
            f"the checkpoint's policy {what} {_short(theirs)}, and here it would be {_short(ours)}; give the "
            "configuration that it was trained with"
        )


class SelfDescription(Callback):
    """Writes the record into every checkpoint, and refuses one that is of other data or another environment.

    Args:
        config: The whole configuration, as plain values.
        accept_versions: Go on with another version of the simulator.
    """

    def __init__(self, config: Mapping[str, Any], accept_versions: bool = False) -> None:
        self.config = config
        self.accept_versions = accept_versions
        self._record: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse checkpoints of weights alone, into which Lightning lets no callback write.

        Raises:
            UserError: One would be saved so.
        """
        if any(saver.save_weights_only for saver in _of_type(trainer, ModelCheckpoint)):
            raise UserError(
                "checkpoint.save_weights_only=true would save the weights as they are trained, in place of their "
                "average, and without a record of what they are; leave it out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the record, which stays the same while a run lasts.

        Raises:
            UserError: It would hold what a checkpoint cannot; now, before anything is trained.
        """
        ema = next(iter(_of_type(trainer, EMA)), None)
        self._record = describe(pl_module, trainer.datamodule, self.config, ema)  # type: ignore[arg-type, attr-defined]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the record."""
        checkpoint[KEY] = self._record

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare a record, if there is one.

        Raises:
            UserError: The checkpoint is of other data, another environment, or another version of it.
        """
        record = _record_of(checkpoint)
        if record is None:  # not written by dopr fit: its shapes have been compared
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        check_versions(record, self.accept_versions)
        check_environment(record, data.environment)
        check_data(record, data)


def _record_of(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """A checkpoint's record; None where there is none, or something of another's under its key."""
    record = checkpoint.get(KEY)
    return record if isinstance(record, dict) and {"format", "versions"} <= record.keys() else None


def _of_type(trainer: Trainer, kind: type[Any]) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def _path(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any, whose: str) -> Any:
    """``value`` as what a checkpoint may hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, whose) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        kind = list if isinstance(value, list) else tuple  # not a class of its own, which weights_only=True refuses
        return kind(_plain(inner, whose) for inner in value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise UserError(f"{whose} holds {value!r}, which a checkpoint cannot; use plain values: numbers, words, lists")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 150 else f"{text[:147]}..."
