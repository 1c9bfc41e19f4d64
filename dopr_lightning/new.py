"""``dopr new``: a project of your own from the template, without knowing cookiecutter."""

from __future__ import annotations

import json
import runpy
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from dopr_lightning.errors import Parser, UserError, did_you_mean, import_extra
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.template import DIRECTORY

Answers = Mapping[str, Any]

NAMES = ("project_name", "project_slug", "package", "author")
"""Questions that are answered in words of your own."""


def main(arguments: Sequence[str], project: Project = LIBRARY) -> None:
    """Make the project, and say what was chosen and how to go on.

    Raises:
        UserError: An answer is none, or does not go with another; the folder exists; cookiecutter is not installed.
    """
    options = _parser(project.command).parse_intermixed_args(arguments)
    questions = _questions()
    given = _given(project.command, options.answers, questions) | {"project_name": options.name}
    if template := next((key for key in NAMES if "{" in given.get(key, "")), None):  # cookiecutter would fill it in
        raise UserError(f"{template} must be a line of printable characters without braces, got {given[template]!r}")
    import_extra("cookiecutter", "template")
    answers = _answers(given)
    if complaint := runpy.run_path(str(DIRECTORY / "hooks" / "pre_gen_project.py"))["complaint"](answers):
        raise UserError(complaint)
    folder = options.output / answers["project_slug"]
    if folder.exists():
        raise UserError(f"{folder} exists; choose another name, or --output")
    _bake(given, options.output)
    _say(project.command, folder, answers, questions)


def _questions() -> dict[str, Any]:
    """The template's questions: a text, yes or no as True or False, or a list whose first entry is the default."""
    asked = json.loads((DIRECTORY / "cookiecutter.json").read_text())
    return {key: value for key, value in asked.items() if not key.startswith("_")}


def _given(command: str, pairs: Sequence[str], questions: Mapping[str, Any]) -> dict[str, Any]:
    """``["task=pusht", "mup=no"]`` as answers.

    Raises:
        UserError: There is no such question, or no such answer to it.
    """
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r}: answers are given as key=value, task=pusht say; see: {command} new --help")
        if key == "project_name":
            raise UserError("project_name is NAME, the first argument")
        if key not in questions:
            hint = did_you_mean(key, questions) or f"; choose from {', '.join(questions)}"
            raise UserError(f"nobody asks for {key!r}{hint}")
        if key in given:
            raise UserError(f"{key} is answered twice")
        given[key] = _answer(key, value, questions[key])
    return given


def _answer(key: str, value: str, asked: Any) -> Any:
    if isinstance(asked, bool):
        if value.lower() not in YES | NO:
            raise UserError(f"{key}={value}: answer yes or no")
        return value.lower() in YES
    if isinstance(asked, list) and value not in asked:
        raise UserError(f"{key}={value}: choose from {', '.join(asked)}")
    return value


YES, NO = {"yes", "y", "true", "on", "1"}, {"no", "n", "false", "off", "0"}


def _answers(given: Answers) -> dict[str, Any]:
    """All answers, the template's own where none are given."""
    from cookiecutter.generate import generate_context
    from cookiecutter.prompt import prompt_for_config

    context = generate_context(str(DIRECTORY / "cookiecutter.json"), extra_context=dict(given))
    return dict(prompt_for_config(context, no_input=True))


def _bake(given: Answers, output: Path) -> None:
    from cookiecutter.main import cookiecutter

    # Nothing is read from, or written to, the home directory.
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "settings.yaml"
        settings.write_text(json.dumps({"replay_dir": scratch, "cookiecutters_dir": scratch}))
        cookiecutter(
            str(DIRECTORY),
            no_input=True,
            extra_context=dict(given),
            output_dir=str(output),
            config_file=str(settings),
        )


def _say(command: str, folder: Path, answers: Answers, questions: Mapping[str, Any]) -> None:
    print(f"made {folder}")
    for key, asked in questions.items():
        answer = answers[key]
        shown = {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else answer
        others = (
            ["yes" if not answer else "no"] if isinstance(asked, bool) else asked if isinstance(asked, list) else []
        )
        instead = ", ".join(other for other in others if other != answer)
        print(f"  {key:<13} {shown:<18} {f'or {instead}' if instead else ''}".rstrip())
    print(
        f"to choose otherwise, remove it and say: {command} new {shlex.quote(answers['project_name'])} task=pusht "
        "mup=no\n"
        "next:\n"
        f"  cd {shlex.quote(str(folder))}\n"
        f"  make quickstart{_library()}   # creates .venv, installs, trains\n"
        "  make test\n"
        "README.md says how to bring your own data"
    )


def _library() -> str:
    """Where this library was installed from, if pip would not find it under its name: an argument of make."""
    origin = json.loads(distribution("dopr-lightning").read_text("direct_url.json") or "{}")
    url: str = origin.get("url", "")
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f" LIBRARY={shlex.quote(url.removeprefix('file://'))}" if url else ""


def _parser(command: str) -> Parser:
    questions = _questions()
    choices = [
        f"{key}: {', '.join(asked) if isinstance(asked, list) else 'yes, no'}"
        for key, asked in questions.items()
        if key not in NAMES
    ]
    parser = Parser(
        prog=f"{command} new",
        allow_abbrev=False,
        description="Make a project of your own around this library: one LightningModule, one DataModule, "
        "configurations, tests, and a README that says how to bring your own data.",
        epilog=f"example: {command} new my-robot task=pusht network=unet mup=no",
    )
    parser.add_argument("name", metavar="NAME", help="of the project, and of its folder")
    parser.add_argument(
        "answers",
        metavar="key=value",
        nargs="*",
        help="what is not answered is the first of: "
        + "; ".join(choices)
        + f". In words of your own: {', '.join(NAMES[1:])}",
    )
    parser.add_argument("--output", type=Path, default=Path(), help="folder to make it in; default: here")
    return parser
