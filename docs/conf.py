"""The site: the Markdown pages of this folder, and an API reference from docstrings. ``make docs`` builds it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from dopr_lightning import __version__

project = "dopr-lightning"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {version}"
html_show_copyright = False

# Formulas in dollars, which GitHub shows as well; links to a page's headings.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

# A name of ours that leads nowhere fails the build. Those of other projects are not looked up: that needs a network.
OTHERS = "torch|lightning|numpy|npt|abc|collections|contextlib|functools|pathlib|typing"
UNQUALIFIED = "LightningModule|Optimizer|OptimizerLRScheduler|Tensor|np.ndarray"
TYPE_VARIABLES = "Condition|LayerType"
nitpick_ignore_regex = [("py:.*", rf"({OTHERS})\..*|{UNQUALIFIED}|dopr_lightning\..*\.({TYPE_VARIABLES})")]
nitpick_ignore = [
    ("py:class", "dict[str"),  # a signature with a default_factory, which Sphinx reads as text
    ("py:class", "dopr_lightning.preconditioner.layers.parameters.Location"),  # the engine's own
]

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks.md"}
"""Files of the repository that are pages of the site, which include them."""


def lead_inside(text: str, file: Path, page: Path) -> str:
    """The text of ``file`` as ``page``, with links such as GitHub follows them turned into links between pages."""

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = Path(os.path.normpath(file.parent / target))
        if not path.is_relative_to(ROOT):
            return match[0]
        path = path / "README.md" if path.is_dir() else path
        inside = ROOT / "docs" / PAGES.get(str(path.relative_to(ROOT)), os.path.relpath(path, ROOT / "docs"))
        return f"]({os.path.relpath(inside, page.parent)}{anchor})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)\s]+)?\)", link, text)


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """For the pages themselves, in place."""
    page = Path(app.env.doc2path(name))
    source[0] = lead_inside(source[0], page, page)


def read_included(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    """For the files that pages include, in place."""
    source[0] = lead_inside(source[0], app.srcdir / path, Path(app.env.doc2path(page)))


def by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Docstrings name things by where they are defined, the reference by where they are imported from."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not re.match(r"dopr_lightning\.|\w+$", target):
        return None
    domain: Any = env.domains.python_domain
    found = [
        name
        for name, entry in domain.objects.items()
        if name.rpartition(".")[2] == target.rpartition(".")[2]
        and entry.objtype in ("class", "exception", "function", "type")
        and not entry.aliased
    ]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("missing-reference", by_last_name)
