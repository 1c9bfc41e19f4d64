"""``dopr demos``: fetch, make and try demonstrations, and put them where the sources look for them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dopr_lightning.errors import Parser, UserError, output_file
from dopr_lightning.project import LIBRARY, Project


def main(arguments: Sequence[str], project: Project = LIBRARY) -> None:
    """Parse the verb's arguments and do as they say.

    Raises:
        UserError: A file is missing or damaged, a download or a simulation failed.
    """
    parser = Parser(
        prog=f"{project.command} demos",
        description="Fetch, make and try demonstrations. Configurations then need no path.",
        epilog=f"example: {project.command} demos lift --scripted 50",
    )
    tasks = parser.add_subparsers(dest="what", required=True, metavar="pusht|lift|robomimic|replay")

    pusht = tasks.add_parser("pusht", help="PushT: Diffusion Policy's demonstrations, from state")
    pusht.add_argument("--path", type=Path, help="a local copy; without it the published file (31 MB) is downloaded")
    pusht.set_defaults(run=_pusht)

    lift = tasks.add_parser("lift", help="robosuite's Lift: demonstrations by a script, in robomimic's format")
    lift.add_argument("--scripted", type=int, required=True, metavar="N", help="how many to make; a second each")
    lift.add_argument("--seed", type=int, default=0, help="of the first attempt (default: %(default)s)")
    lift.add_argument("--images", action="store_true", help="also what two cameras see, 84 x 84; needs OpenGL")
    lift.add_argument("--output", type=output_file, help="where to (default: where the source Robomimic looks)")
    lift.set_defaults(run=_lift)

    robomimic = tasks.add_parser("robomimic", help="robomimic: people's demonstrations of five robosuite tasks")
    robomimic.add_argument("--task", required=True, help="lift, can, square, tool_hang or transport")
    robomimic.add_argument("--type", default="ph", help="ph, one proficient person, or mh, several people")
    robomimic.add_argument(
        "--hdf5",
        default="low_dim",
        choices=["low_dim", "image"],
        help="which observations; images are rendered here from the low_dim file's states, which needs OpenGL",
    )
    robomimic.set_defaults(run=_robomimic)

    replay = tasks.add_parser("replay", help="play a robomimic file's actions in this simulator, and count successes")
    replay.add_argument("file", type=Path, help="robomimic HDF5")
    replay.add_argument("--episodes", type=int, help="only the first so many")
    replay.add_argument("--absolute", action="store_true", help="by way of absolute actions with 6-D rotations")
    replay.set_defaults(run=_replay)

    options = parser.parse_args(arguments)
    options.run(options)


def _pusht(options: argparse.Namespace) -> None:
    from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    from dopr_lightning.data.pusht import register

    with _bar("pusht", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as update:
        registered = register(options.path, update)
    print(f"pusht: {registered.episodes} episodes, {registered.steps} steps, registered in {registered.path}")


def _lift(options: argparse.Namespace) -> None:
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    from dopr_lightning.data.robomimic import registered_file
    from dopr_lightning.data.robomimic.images import CAMERAS
    from dopr_lightning.data.robomimic.lift import demonstrate

    output = options.output or registered_file("lift", "scripted", "image" if options.images else "low_dim")
    with _bar("lift", MofNCompleteColumn(), TimeRemainingColumn()) as update:
        made = demonstrate(
            output,
            options.scripted,
            options.seed,
            CAMERAS["lift"] if options.images else (),
            lambda kept: update(kept, options.scripted),
        )
    print(
        f"lift: {made.episodes} demonstrations, {made.steps} steps, in {made.path}; the script lifted the cube in "
        f"{made.episodes} of {made.tried} attempts ({made.episodes / made.tried:.0%})"
    )


def _robomimic(options: argparse.Namespace) -> None:
    from rich.progress import DownloadColumn, MofNCompleteColumn, TimeRemainingColumn, TransferSpeedColumn

    from dopr_lightning.data.robomimic import registered_file
    from dopr_lightning.data.robomimic.files import DemoFile
    from dopr_lightning.data.robomimic.images import CAMERAS, add_images
    from dopr_lightning.data.robomimic.published import fetch

    name = f"{options.task} {options.type}"
    path = registered_file(options.task, options.type)
    if options.hdf5 == "low_dim" or not path.is_file():
        with _bar(f"{name} low_dim", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as update:
            fetch(options.task, options.type, update)
    if options.hdf5 == "image":
        images = registered_file(options.task, options.type, "image")
        with _bar(f"{name} image", MofNCompleteColumn(), TimeRemainingColumn()) as update:
            add_images(path, images, CAMERAS[options.task], progress=update)
        path = images
    with DemoFile(path) as file:
        print(f"{name} {options.hdf5}: {len(file.demos)} demonstrations, in {path}")


def _replay(options: argparse.Namespace) -> None:
    from dopr_lightning.data.robomimic.replay import SAME, replay

    played = []
    for one in replay(options.file, options.episodes, options.absolute):
        played.append(one)
        print(f"{one.demo}: {'solved' if one.solved else 'not solved'}, off its path by up to {one.deviation:.2g}")
    solved = sum(one.solved for one in played)
    worst = max(played, key=lambda one: one.deviation)
    print(
        f"{solved} of {len(played)} are solved again; {worst.demo} is furthest off its path, by {worst.deviation:.2g}"
    )
    off = {key: max(one.observations[key] for one in played) for key in played[0].observations}
    if changed := {key: value for key, value in off.items() if value > SAME}:
        listed = ", ".join(f"{key} (by up to {value:.2g})" for key, value in changed.items())
        print(
            f"in the recorded states this simulator observes otherwise: {listed}; leave these out of the source's keys"
        )
    elif off:
        print(f"in the recorded states this simulator observes what the file holds of: {', '.join(off)}")
    if not solved:
        raise UserError(
            f"{options.file}: no demonstration is solved again, so no policy can be expected to; install the robosuite "
            "and mujoco it was recorded with, or fetch the file for robosuite 1.5 (dopr demos robomimic)"
        )


@contextmanager
def _bar(name: str, *columns: Any) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr; yields what moves it to so much of so much, and shows it at the first move."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    progress = Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=Console(stderr=True))
    task = progress.add_task(name, total=None)

    def update(done: int, total: int | None) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if progress.live.is_started:  # else it would print an empty line
            progress.stop()
