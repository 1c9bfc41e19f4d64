"""Every project that the template makes is whole, lints, type-checks and parses; or answers are refused in a line."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from baking import CHOICES, ROOT, TEMPLATE, bake, possible
from cookiecutter.exceptions import FailedHookException
from covering import pairwise

from dopr_lightning.optim import BASES
from dopr_lightning.training import resolve

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

FACTORS = {key: values for key, values in CHOICES.items() if key != "licence"}
ROWS = pairwise(FACTORS, possible)
PARTS = 2  # of the rows, for processes to share


def files(project: Path) -> list[str]:
    return sorted(str(path.relative_to(project)) for path in project.rglob("*") if path.is_file())


COMMON = [
    ".github/workflows/ci.yml",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "Makefile",
    "README.md",
    "configs/debug.yaml",
    "configs/dopr.yaml",
    "configs/experiment.yaml",
    "configs/sweep.yaml",
    "configs/trainer.yaml",
    "pyproject.toml",
    "src/{package}/__init__.py",
    "src/{package}/__main__.py",
    "src/{package}/data.py",
    "src/{package}/module.py",
    "tests/conftest.py",
    "tests/test_data.py",
    "tests/test_policy.py",
]


def check_whole(project: Path, package: str, answers: dict[str, Any]) -> None:
    """Nothing is missing, nothing is there that the answers have no use for, and nothing of the template is left."""
    wanted = [name.format(package=package) for name in COMMON]
    wanted += [f"src/{package}/example.py"] if answers["task"] == "own" else []
    wanted += ["train.sbatch"] if answers["trainer"] == "slurm" else []
    assert files(project) == sorted(wanted)
    for name in files(project):
        text = (project / name).read_text()
        left = re.findall(r"\{\{|\}\}|\{%|%\}|cookiecutter", text)
        assert not left, (name, left)
        assert text.endswith("\n"), name
        assert not text.endswith("\n\n"), name
        if name.endswith((".yaml", ".yml")):
            yaml.safe_load(text)
    unused = {"own": "example", "slurm": "sbatch", "wandb": "wandb"}
    whole = "".join((project / name).read_text() for name in files(project) if name != "tests/conftest.py")
    for answer, word in unused.items():
        assert (word in whole.lower().replace("for example", "").replace("an example", "")) == (
            answer in answers.values()
        ), word


@pytest.mark.parametrize("part", range(PARTS))
def test_all_pairs_of_answers(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projects = []
    for index, answers in list(enumerate(ROWS))[part::PARTS]:
        name = f"Pair {index}"
        project = bake(tmp_path, project_name=name, **answers)
        check_whole(project, f"pair_{index}", answers)
        projects.append((f"pair_{index}", project))

    # One run of the tools over all; a test module's name must be its own there.
    everything = tmp_path / "everything"
    for package, project in projects:
        for test in (project / "tests").glob("*.py"):
            text = test.read_text().replace("from conftest import", f"from {package}_conftest import")
            (everything / "tests").mkdir(parents=True, exist_ok=True)
            (everything / "tests" / f"{package}_{test.name}").write_text(text)
        shutil.copytree(project / "src" / package, everything / "src" / package)
    shutil.copy(projects[0][1] / "pyproject.toml", everything)
    ruff = [sys.executable, "-m", "ruff"]
    for verb in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run([*ruff, *verb, "--no-cache", str(tmp_path / "output")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache")]
    environment = {"MYPYPATH": "src:tests", "PATH": ""}
    done = subprocess.run(mypy, cwd=everything, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    monkeypatch.chdir(tmp_path)
    for package, project in projects:
        monkeypatch.syspath_prepend(str(project / "src"))
        own = importlib.import_module(f"{package}.__main__").PROJECT
        experiment = f"--config={project / 'configs' / 'experiment.yaml'}"
        for others in (["trainer"], ["debug"], ["sweep"]):
            config = resolve(
                [experiment, *(f"--config={project / 'configs' / f'{name}.yaml'}" for name in others)], own
            )
            assert config["classes"]["policy"] == f"{package}.module.Policy"


def test_names_end_up_where_they_belong(tmp_path: Path) -> None:
    name, author = 'Jan\'s "Arm" 2 \\ é 🤖', 'J. "X" O\'Neil 🦾'
    project = bake(tmp_path, project_name=name, author=author, licence="BSD-3-Clause")
    assert project.name == "jan-s-arm-2-e"
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert about["name"] == "jan-s-arm-2-e"
    assert about["description"].startswith(f"{name}: ")
    assert about["authors"] == [{"name": author}]
    assert about["license"] == "BSD-3-Clause"
    assert (project / "README.md").read_text().startswith(f"# {name}\n")
    assert author in (project / "LICENSE").read_text()
    assert (project / "src/jan_s_arm_2_e/module.py").is_file()


@pytest.mark.parametrize("logger", CHOICES["logger"])
def test_a_name_is_no_value_of_yaml(tmp_path: Path, logger: str) -> None:
    project = bake(tmp_path, project_name="On", logger=logger)
    trainer = yaml.safe_load((project / "configs/experiment.yaml").read_text())["trainer"]
    assert "on" in trainer["logger"]["init_args"].values()


def test_a_job_writes_where_slurm_can_and_keeps_what_it_said_before_it_was_requeued(tmp_path: Path) -> None:
    """SLURM makes no folders for its output: a job whose output has none fails without a word."""
    project = bake(tmp_path, trainer="slurm")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", (project / "train.sbatch").read_text(), re.M))
    assert (project / options["output"]).parent.is_dir()
    assert options["open-mode"] == "append"
    assert options["output"].replace("%j", "*") in (project / ".gitignore").read_text().split()


@pytest.mark.parametrize("logger", CHOICES["logger"])
def test_a_requeued_job_goes_on_in_its_folder(logger: str, tmp_path: Path) -> None:
    """Of itself Weights & Biases begins another run; the version of other loggers is the job's number."""
    script = (bake(tmp_path, trainer="slurm", logger=logger) / "train.sbatch").read_text()
    assert ('\nexport WANDB_RUN_ID="${SLURM_CLUSTER_NAME:-slurm}-$SLURM_JOB_ID"' in script) == (logger == "wandb")


@pytest.mark.parametrize(
    ("licence", "begins"),
    [
        ("MIT", "MIT License"),
        ("Apache-2.0", "Apache License"),
        ("BSD-3-Clause", "BSD 3-Clause License"),
        ("proprietary", "Copyright"),
    ],
)
def test_licences(tmp_path: Path, licence: str, begins: str) -> None:
    text = (bake(tmp_path, licence=licence, author="Somebody") / "LICENSE").read_text()
    assert text.strip().startswith(begins)
    assert re.search(r"Copyright (\(c\) )?20\d\d,? Somebody", text)


@pytest.mark.parametrize(("base", "mup", "clips"), [("sgd", True, False), ("sgd", False, True), ("adamw", True, True)])
def test_nothing_is_clipped_where_the_library_refuses_it(base: str, mup: bool, clips: bool, tmp_path: Path) -> None:
    project = bake(tmp_path, base=base, mup=mup)
    experiment = yaml.safe_load((project / "configs" / "experiment.yaml").read_text())
    assert ("gradient_clip_val" in experiment["trainer"]) is clips


def test_the_bases_are_the_librarys() -> None:
    assert set(CHOICES["base"]) == set(BASES)


@pytest.mark.parametrize("where", ["the root", "a clone"])
def test_from_the_root_and_from_a_git_url(tmp_path: Path, where: str) -> None:
    if where == "the root":
        project = bake(tmp_path, directory=None)
    else:
        repository = tmp_path / "repository.git"  # cookiecutter asks that git be in the address
        shutil.copytree(TEMPLATE, repository / "template", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "cookiecutter.json", repository)
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-C", str(repository)]
        for command in (["init", "-q"], ["add", "--all", "--force"], ["commit", "-q", "-m", "template"]):
            subprocess.run([*git, *command], check=True)
        project = bake(tmp_path, f"file://{repository}", directory=None)
    assert project.name == "robot-policy"
    defaults = {key: values[0] for key, values in CHOICES.items()}
    check_whole(project, "robot_policy", defaults)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"project_slug": "My Policy"}, "project_slug must be lowercase letters and digits, joined by single hyphens"),
    ({"package": "class"}, "package must be a lowercase Python identifier of at most 40 characters, got 'class'"),
    ({"package": "a" * 41}, "package must be a lowercase Python identifier of at most 40 characters"),
    ({"project_name": "Torch"}, "project_slug 'torch' is a module that the project uses; choose another name"),
    ({"package": "json"}, "package 'json' is a module that the project uses; choose another name"),
    ({"package": "yaml"}, "package 'yaml' is a module that the project uses; choose another name"),
    ({"project_name": "Test"}, "project_slug 'test' is a module that the project uses; choose another name"),
    ({"author": " "}, "author must be a line of printable characters without braces, got ' '"),
    ({"author": "a\nb"}, "author must be a line of printable characters"),
    ({"project_name": "a {b}", "project_slug": "a"}, "project_name must be a line of printable characters without"),
    ({"base": "soap", "trainer": "fsdp2"}, "base 'soap' needs whole matrices, which trainer 'fsdp2' shards; answer"),
]


@pytest.mark.parametrize(("answers", "message"), BAD)
def test_bad_answers_are_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], answers: dict[str, Any], message: str
) -> None:
    with pytest.raises(FailedHookException):
        bake(tmp_path, **answers)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list((tmp_path / "output").iterdir())


def test_what_the_hook_refuses_is_what_cannot_work() -> None:
    complaint = runpy.run_path(str(TEMPLATE / "hooks/pre_gen_project.py"))["complaint"]
    names = {"project_name": "A", "project_slug": "a-b", "package": "a_b", "author": "A"}
    assert complaint(names | {"base": "adamw", "trainer": "cpu"}) is None
    for base in CHOICES["base"]:
        for trainer in CHOICES["trainer"]:
            answers = {"base": base, "trainer": trainer}
            assert (complaint(names | answers) is None) == possible(answers)


def test_the_prompts_are_of_the_questions() -> None:
    asked = json.loads((TEMPLATE / "cookiecutter.json").read_text())
    prompts = asked.pop("__prompts__")
    assert set(prompts) == set(asked)
    for key, prompt in prompts.items():
        if isinstance(prompt, dict):
            assert set(prompt) - {"__prompt__"} == set(asked[key])
