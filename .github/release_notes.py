"""Print CHANGELOG.md's section of a version; refuse one that is not the package's, or has no notes.

python .github/release_notes.py 0.1.0
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(version: str, changelog: str) -> str:
    """The text under ``## VERSION``, up to the next version.

    Raises:
        SystemExit: There is no such section, it is empty, or it is marked as unreleased.
    """
    heading = re.search(rf"^## {re.escape(version)}\b(.*)$", changelog, re.MULTILINE)
    if heading is None:
        sys.exit(f"error: CHANGELOG.md has no section '## {version}'; write one")
    if "unreleased" in heading[1]:
        sys.exit(f"error: CHANGELOG.md says that {version} is unreleased; give it its date")
    text = re.split(r"^## ", changelog[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0].strip()
    return text or sys.exit(f"error: CHANGELOG.md says nothing of {version}")


def main(version: str) -> None:
    """Check the version, print its notes."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "dopr_lightning" / "__init__.py").read_text(), re.MULTILINE)
    if found is None or found[1] != version:
        sys.exit(f"error: the tag says {version}, dopr_lightning.__version__ {found and found[1]}; make them agree")
    print(notes(version, (ROOT / "CHANGELOG.md").read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
