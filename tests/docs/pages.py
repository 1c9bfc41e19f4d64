"""What the README and the site's pages say to run, as blocks of code."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
        *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.relative_to(DOCS).parts),
    )
}
RECORDED = tuple(name for name in PAGES if name.startswith(("docs/results/", "benchmarks/")))
"""Pages that tell which commands made a measurement, some in hours: indented blocks, which are not run again."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        page: Where it stands.
        line: From 1.
        language: Of the fence; of an indented block ``"indented"``.
        text: Without the fence.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        """For pytest."""
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file it is a part of: blocks that begin with ``# name.py`` make one up together."""
        named = re.match(r"(?:#!.*\n)?# ([\w-]+\.(?:py|yaml|sh))\n", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        """Its lines, with those joined that a backslash or an open quotation mark continues; without comments."""
        return [line for line in _logical_lines(self.text) if shlex.split(line, comments=True)]


def _logical_lines(text: str) -> Iterator[str]:
    open_line = ""
    for line in text.splitlines():
        open_line += line
        if open_line.endswith("\\"):
            open_line = open_line[:-1]
        elif open_line.count('"') % 2:
            open_line += " "
        else:
            yield open_line
            open_line = ""
    assert not open_line, f"unfinished: {open_line}"


@cache
def blocks(page: str) -> list[Block]:
    """All blocks of code of a page."""
    found = []
    for token in MarkdownIt().parse(PAGES[page].read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            language = token.info.split()[0] if token.info else "indented" if token.type == "code_block" else ""
            found.append(Block(page, token.map[0] + 1, language, token.content))
    return found


def code_spans(page: str) -> list[str]:
    """All code within the text of a page."""
    tokens = MarkdownIt().enable("table").parse(PAGES[page].read_text())
    return [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]


def of_language(*languages: str) -> list[Block]:
    """All pages' blocks in these languages; of equal ones the first."""
    first: dict[str, Block] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language in languages:
                first.setdefault(block.text, block)
    return list(first.values())


def files(page: str) -> dict[str, str]:
    """The files that a page's blocks make up."""
    found: dict[str, str] = {}
    for block in blocks(page):
        if block.file:
            found[block.file] = found.get(block.file, "") + block.text
    return found


def run_by_commands(page: str) -> set[str]:
    """The files among them that a command of the page runs."""
    commands = [assignments(command)[1] for b in blocks(page) if b.language == "bash" for command in b.commands]
    return {words[1] for words in commands if words[0] == "python"}


def write_files(page: str, folder: Path) -> None:
    """Save a page's files."""
    for name, text in files(page).items():
        (folder / name).write_text(text)


def assignments(command: str) -> tuple[dict[str, str], list[str]]:
    """``NAME=value`` in front of a command, and the command's words."""
    words = shlex.split(os.path.expandvars(command), comments=True)
    count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]
