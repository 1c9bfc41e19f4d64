"""What runs on GitHub names commands that exist, and a release tells what is in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NOTES = ROOT / ".github" / "release_notes.py"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_is_there(path: Path) -> None:
    # YAML takes the key "on" for true.
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    made = {target for step in steps for target in re.findall(r"\bmake ([a-z]+)", step.get("run", ""))}
    assert made
    assert made <= targets
    for script in re.findall(r"python (\S+\.py)", path.read_text()):
        assert (ROOT / script).is_file()
    for step in steps:
        assert ("uses" in step) != ("run" in step), step


def test_every_supported_python_is_tested() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    oldest = re.search(r'requires-python = ">=(.+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"][0] == oldest[1]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name)
def test_issue_forms_are_what_github_reads(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def release_notes(tmp_path: Path, version: str, changelog: str, package: str = "1.2.0") -> tuple[int, str]:
    script = tmp_path / ".github" / NOTES.name
    script.parent.mkdir()
    script.write_text(NOTES.read_text())
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    (tmp_path / "dopr_lightning").mkdir()
    (tmp_path / "dopr_lightning" / "__init__.py").write_text(f'__version__ = "{package}"\n')
    done = subprocess.run([sys.executable, script, version], capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).strip()


CHANGELOG = "# Changelog\n\n## 1.2.0 (2026-11-25)\n\n- New.\n- Mended.\n\n## 1.1.0 (2026-01-01)\n\n- Old.\n"


def test_release_notes_are_the_versions_section(tmp_path: Path) -> None:
    assert release_notes(tmp_path, "1.2.0", CHANGELOG) == (0, "- New.\n- Mended.")


@pytest.mark.parametrize(
    ("version", "changelog", "message"),
    [
        ("1.3.0", CHANGELOG, "the tag says 1.3.0, dopr_lightning.__version__ 1.2.0"),
        ("1.2.0", CHANGELOG.replace("## 1.2.0", "## 1.2.1"), "no section '## 1.2.0'"),
        ("1.2.0", CHANGELOG.replace("2026-11-25", "unreleased"), "1.2.0 is unreleased"),
        ("1.2.0", "## 1.2.0\n\n## 1.1.0\n- Old.\n", "says nothing of 1.2.0"),
    ],
)
def test_a_release_that_does_not_fit_is_refused(tmp_path: Path, version: str, changelog: str, message: str) -> None:
    status, said = release_notes(tmp_path, version, changelog)
    assert status == 1
    assert message in said


def test_the_package_says_its_version_has_notes() -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "dopr_lightning" / "__init__.py").read_text())
    assert version
    assert f"## {version[1]} " in (ROOT / "CHANGELOG.md").read_text()
