"""Refuse answers that would make a broken project, in one line that names the answer and the way out.

Valid Python also before it is rendered: ``dopr new`` asks :func:`complaint` before it makes anything.
"""

import json
import keyword
import re
import sys

# Of what is installed with the project, too: one module would hide the other.
TAKEN = sys.stdlib_module_names | {
    "diffusers",
    "dopr_lightning",
    "filelock",
    "gym_pusht",
    "gymnasium",
    "h5py",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "mujoco",
    "mup",
    "mypy",
    "numpy",
    "pip",
    "pytest",
    "pytorch_optimizer",
    "rich",
    "robomimic",
    "robosuite",
    "ruff",
    "safetensors",
    "scipy",
    "setuptools",
    "site_packages",
    "src",
    "tensorboard",
    "test",  # of Python's own, and yet no name of its list
    "tests",
    "torch",
    "torchmetrics",
    "torchvision",
    "wandb",
    "yaml",
    "zarr",
}


def complaint(answers: dict[str, str | bool]) -> str | None:
    """What is wrong with the answers, and what to answer; None if nothing is."""
    name, slug, package, author = (str(answers[key]) for key in ("project_name", "project_slug", "package", "author"))
    for key, value in (("project_name", name), ("author", author)):
        if not value.strip() or not value.isprintable() or "{" in value:
            return f"{key} must be a line of printable characters without braces, got {value!r}"
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        return f"project_slug must be lowercase letters and digits, joined by single hyphens, got {slug!r}"
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", package) or keyword.iskeyword(package):
        return f"package must be a lowercase Python identifier of at most 40 characters, got {package!r}"
    for key, value in (("project_slug", slug.replace("-", "_")), ("package", package)):
        if value in TAKEN:
            return f"{key} {value!r} is a module that the project uses; choose another name"
    if answers["base"] == "soap" and answers["trainer"] == "fsdp2":
        return "base 'soap' needs whole matrices, which trainer 'fsdp2' shards; answer trainer=ddp, or another base"
    return None


if __name__ == "__main__" and (found := complaint(json.loads(r"""{{ cookiecutter|tojson }}"""))):
    sys.exit(f"error: {found}")
