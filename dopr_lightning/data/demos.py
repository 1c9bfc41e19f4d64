"""``dopr demos``: check demonstrations and put them where the sources look for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dopr_lightning.data import pusht
from dopr_lightning.errors import Parser


def main(arguments: Sequence[str]) -> None:
    """Parse the verb's arguments and register the demonstrations.

    Raises:
        UserError: The file is missing or damaged, or the download failed.
    """
    parser = Parser(
        prog="dopr demos",
        description="Check demonstrations and register them, so that configurations need no path.",
        epilog="example: dopr demos pusht --path pusht_cchi_v7_replay.zarr.zip",
    )
    parser.add_argument("task", choices=["pusht"], help="pusht: the Diffusion Policy demonstrations, from state")
    parser.add_argument("--path", type=Path, help="a local copy; without it the published file (31 MB) is downloaded")
    options = parser.parse_args(arguments)
    registered = pusht.register(options.path)
    print(f"{options.task}: {registered.episodes} episodes, {registered.steps} steps, registered in {registered.path}")
