"""The template of a project, for ``dopr new`` and for cookiecutter."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
