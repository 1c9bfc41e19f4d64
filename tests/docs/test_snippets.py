"""Every snippet of the README and of docs/ runs, and every piece of a configuration is understood."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from pages import PAGES, ROOT, Block, blocks, of_language, run_by_commands, write_files

from dopr_lightning.configuration import find_config
from dopr_lightning.training import resolve

WITH_SNIPPETS = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> Iterator[Path]:
    """A folder to work in, that Python looks into."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with patch.dict(os.environ):  # Lightning names the ranks of a group there
        yield tmp_path
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_the_snippets_of_a_page_run_one_after_another(page: str, here: Path) -> None:
    namespace = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python" and block.file not in run_by_commands(page):
            # Lines as the page counts them, for tracebacks.
            exec(compile("\n" * block.line + block.text, page, "exec"), namespace)


@pytest.mark.parametrize("block", of_language("yaml"), ids=lambda block: block.id)
def test_pieces_of_configurations_are_understood(block: Block, here: Path) -> None:
    write_files(block.page, here)
    (here / "piece.yaml").write_text(block.text)
    resolve([f"--config={find_config('walker2d.yaml')}", "--config=piece.yaml"])


def test_messages_are_quoted_as_the_package_writes_them() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "dopr_lightning").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    page = PAGES["docs/troubleshooting.md"].read_text()
    quoted = [
        span for heading in re.findall(r"^### (.*)$", page, re.MULTILINE) for span in re.findall("`(.+?)`", heading)
    ]
    assert len(quoted) > 20
    parts = [part.strip() for message in quoted for part in message.split("...")]
    assert [part for part in parts if part not in source] == []
