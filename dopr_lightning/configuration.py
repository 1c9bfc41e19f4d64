"""Which file is meant by a configuration's name, what is wrong with what it holds, how does it differ from another?"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dopr_lightning.configs import available, locate
from dopr_lightning.errors import UserError, did_you_mean, one_line

CLASS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a class in a configuration."""

NO_PATH = r"- Expected a path but \S+ either not accessible or invalid - "
"""jsonargparse also takes the path of a file with the settings of a class, and says so first."""

REQUIRED = re.compile(r"the following arguments are required: (fit|validate|test)\.")
"""What jsonargparse says where no configuration is given, with the verb."""

NOTHING_TO_JUDGE = "what is to be judged? Give --ckpt FILE, or --ckpt_path FILE beside its configuration"


def find_config(name: str) -> str:
    """The file of that name here, or else among those that come with the package.

    Raises:
        UserError: There is none, or it is no configuration.
    """
    path = locate(name)
    if not Path(path).is_file():
        known = available()
        close = [f"{name}.yaml"] if f"{name}.yaml" in known else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else "dopr --help lists the package's"
        raise UserError(f"no configuration file {name!r} here, nor in the package; {hint}")
    _check(Path(path))
    return path


def packaged_configs(args: Sequence[str]) -> Iterator[str]:
    """Resolve ``--config NAME`` and ``--config=NAME``."""
    named = False
    for arg in args:
        flag, equals, value = arg.partition("=")
        if named:
            yield find_config(arg)
        elif equals and flag in ("--config", "-c"):
            yield f"{flag}={find_config(value)}"
        else:
            yield arg
        named = not named and arg in ("--config", "-c")


def reason(error: Exception) -> str:
    """The line that says what is wrong, out of the many in which jsonargparse says what it tried."""
    cause: BaseException = error
    while "Union subtypes" in str(cause) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = re.match(r'Parser key "([^"]+)"', str(error))
    text = one_line(cause)
    for noise in (
        r'^Parser key "[^"]+":',
        r"Type \S.* callable class:",
        r"\. Got value: Namespace\(.*",
        NO_PATH,
    ):
        text = re.sub(noise, "", text).strip()
    if absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        text = f"{absent[0]}{did_you_mean(absent[2], dir(importlib.import_module(absent[1])))}"
    elif text.startswith("Expected a dot import path"):
        text += "; give the whole path, as in dopr_lightning.policies.networks.ResidualMLP"
    return f"{key[1]}: {text}" if key else text


def reason_with_place(error: Exception, args: Sequence[str], known: Iterable[str]) -> str:
    """The same; and for an option that there is not, which of the files has it and what was probably meant.

    Args:
        error: jsonargparse's.
        args: The command's.
        known: The options that there are.
    """
    text = reason(error)
    if (missing := REQUIRED.match(text)) and not any(_config_names(args)):
        if missing[1] == "fit":
            return f"{text}; name a configuration, as in --config walker2d.yaml"
        return NOTHING_TO_JUDGE
    if stray := re.search(r"unrecognized arguments: (?!-)(\S+\.ya?ml)", text):
        return f"{text}; did you mean --config {stray[1]}?"
    said = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", text)
    if said is None:
        return text
    option = said[1] or said[2]
    files = [Path(find_config(name)) for name in _config_names(args)] if said[2] else []
    where = [f"{file}: " for file in files if _sets(yaml.safe_load(file.read_text()), option)]
    options = [name for name in known if not name.endswith(".help")]
    hint = did_you_mean(option, options) or did_you_mean(option.rpartition(".")[0], options)
    return f"{where[-1] if where else ''}{text}{hint}"


def _config_names(args: Sequence[str]) -> Iterator[str]:
    """The values of ``--config``."""
    for before, arg in pairwise(("", *args)):
        flag, _, value = arg.partition("=")
        if before in ("--config", "-c"):
            yield arg
        elif value and flag in ("--config", "-c"):
            yield value


def _check(path: Path) -> None:
    """Say which file is at fault, where jsonargparse would speak of a string or of another key."""
    try:
        text = path.read_text()
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings; a configuration begins with data:, model: or trainer:")
    if again := next(_repeated(yaml.compose(text, yaml.SafeLoader)), None):
        raise UserError(
            f"{path}: {again.value} is there twice, again in line {again.start_mark.line + 1}; join the two"
        )
    for place, keys in _mappings(content):
        if "class_path" in keys and (other := next((key for key in keys if key not in CLASS), None)):
            raise UserError(
                f"{path}: {place} has {other!r} beside class_path, where only init_args and dict_kwargs may be"
                f"{did_you_mean(str(other), CLASS)}"
            )


def _repeated(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Keys that their mapping has had before: YAML forbids them, and PyYAML forgets what the earlier one held."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    yield key
                seen.add(key.value)
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item)


def _mappings(content: Any, place: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every mapping in a configuration, with its dotted name."""
    if isinstance(content, dict):
        yield place, content
        for key, value in content.items():
            yield from _mappings(value, f"{place}.{key}".lstrip("."))
    elif isinstance(content, list):
        for value in content:
            yield from _mappings(value, place)


def _sets(content: Any, option: str) -> bool:
    """Whether a configuration has that dotted key."""
    for key in option.split("."):
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()) -> str:
    """What changed, in a few words, ``"data.batch_size: 256 -> 128"``; empty if nothing did.

    An option that only one of them has, and leaves off (null or false), is no difference: it is newer than the other.
    """
    before, after = (
        dict(_flat({key: value for key, value in values.items() if key not in ignore})) for values in (old, new)
    )
    both = before | after
    left_off = {key for key in before.keys() ^ after.keys() if both[key] is None or both[key] is False}
    changed = [key for key in both if before.get(key) != after.get(key) and key not in left_off]
    shown = [f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}" for key in changed[:3]]
    return ", ".join(shown + [f"{len(changed) - 3} more"] * (len(changed) > 3))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict | list):
        return [(prefix.removesuffix("."), value)]
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return [leaf for key, inner in pairs for leaf in _flat(inner, f"{prefix}{key}.")]
