"""The site builds as `make docs` builds it, and would not with a broken link, image or reference."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, ROOT


def build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Run the Makefile's own command, with the site's settings."""
    recipe = re.search(
        r"^docs:.*\n\t\$\(BIN\)/sphinx-build (.*) docs docs/_build$", (ROOT / "Makefile").read_text(), re.M
    )
    assert recipe
    command = [sys.executable, "-m", "sphinx", *shlex.split(recipe[1]), "--conf-dir", str(DOCS), source, output]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = build(DOCS, tmp_path)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "results" / "mup" / "README.html").is_file()
    api = (tmp_path / "api.html").read_text()
    assert 'id="dopr_lightning.DoPr"' in api
    assert "Weight of past covariances at a refresh" in api


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("[here](nowhere.md)", "nowhere.md"),
        ("[here](index.md#no-such-heading)", "no-such-heading"),
        ("![A plot](no.png)", "no.png"),
        ("{py:class}`dopr_lightning.DoPrr`", "dopr_lightning.DoPrr"),
    ],
    ids=["page", "heading", "image", "reference"],
)
def test_what_leads_nowhere_fails_the_build(mistake: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(f"# Title\n\n{mistake}\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert said in built.stderr
