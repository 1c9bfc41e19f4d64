"""``dopr new``: a project in one command, what was chosen in so many words, and answers that are none refused."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from baking import CHOICES

from dopr_lightning import new
from dopr_lightning.cli import main


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to make projects in, and an empty home."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


def test_without_options(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "my-robot"]) == 0
    assert [path.name for path in here.iterdir()] == ["my-robot"]
    assert (here / "my-robot/src/my_robot/module.py").is_file()
    said = capsys.readouterr().out
    assert said.startswith("made my-robot\n")
    for key, values in CHOICES.items():
        words = [{True: "yes", False: "no"}.get(value, value) for value in values]
        assert re.search(rf"^  {key} +{words[0]} +or {', '.join(words[1:])}$", said, re.MULTILINE), key
    assert "dopr new my-robot task=pusht" in said  # how to change it
    assert "  cd my-robot\n  make quickstart" in said
    assert "\n  make test\n" in said
    assert not list((here.parent / "home").rglob("*"))


def test_answers_and_another_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["task=own", "mup=no", "package=arm", "licence=proprietary", "trainer=slurm", "author=Somebody"]
    assert main(["new", "Jan's Arm", *answers, "--output", "below/it"]) == 0
    project = here / "below/it/jan-s-arm"
    assert (project / "src/arm/example.py").is_file()
    assert (project / "train.sbatch").is_file()
    assert "mup:" not in (project / "configs/experiment.yaml").read_text()
    assert "Somebody" in (project / "LICENSE").read_text()
    said = capsys.readouterr().out
    assert re.search(r"^  task +own +or gymnasium, pusht, robomimic$", said, re.MULTILINE)
    assert re.search(r"^  mup +no +or yes$", said, re.MULTILINE)
    assert "cd below/it/jan-s-arm" in said


def test_answers_may_follow_an_option(here: Path) -> None:
    assert main(["new", "a", "task=own", "--output", "below", "mup=no"]) == 0
    assert "mup:" not in (here / "below/a/configs/experiment.yaml").read_text()


REFUSED = [
    (["a", "task=push"], "task=push: choose from gymnasium, own, pusht, robomimic"),
    (["a", "tsak=pusht"], "nobody asks for 'tsak'; did you mean task?"),
    (["a", "colour=red"], "nobody asks for 'colour'; choose from project_name, project_slug"),
    (["a", "mup=maybe"], "mup=maybe: answer yes or no"),
    (["a", "pusht"], "'pusht': answers are given as key=value"),
    (["a", "task=own", "task=pusht"], "task is answered twice"),
    (["a", "project_name=b"], "project_name is NAME"),
    (["torch"], "project_slug 'torch' is a module that the project uses; choose another name"),
    (["a", "package=1st"], "package must be a lowercase Python identifier"),
    (["a", "author={{b}}"], "author must be a line of printable characters without braces, got '{{b}}'"),
    (["{{"], "project_name must be a line of printable characters without braces, got '{{'"),
    (["a", "base=soap", "trainer=fsdp2"], "base 'soap' needs whole matrices, which trainer 'fsdp2' shards; answer"),
    (["there"], "there exists; choose another name, or --output"),
    (["a", "--force"], "unrecognized arguments: --force; see: dopr new --help"),
    ([], "NAME"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals(arguments: list[str], message: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "there").mkdir()
    assert main(["new", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("dopr: error: ")
    assert message in err
    assert [path.name for path in here.iterdir()] == ["there"]


def test_without_cookiecutter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cookiecutter", None)
    assert main(["new", "a"]) == 2
    assert "pip install 'dopr-lightning[template]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("origin", "argument"),
    [
        (None, ""),
        ('{"url": "file:///a place/dopr", "dir_info": {"editable": true}}', " LIBRARY='/a place/dopr'"),
        (
            '{"url": "https://example.com/d.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
            " LIBRARY=git+https://example.com/d.git@abc",
        ),
    ],
)
def test_the_next_command_says_where_the_library_comes_from(
    origin: str | None, argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Installed:
        @staticmethod
        def read_text(name: str) -> str | None:
            return origin

    monkeypatch.setattr(new, "distribution", lambda name: Installed)
    assert main(["new", "my-robot"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "make quickstart" in line)
    assert line.split("   #")[0] == f"  make quickstart{argument}"
    assert shlex.split(line, comments=True)[:2] == ["make", "quickstart"]
