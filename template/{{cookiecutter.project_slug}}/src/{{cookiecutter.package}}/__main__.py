"""Every verb of dopr, on this project's policy and data: python -m {{ cookiecutter.package }} --help."""

import sys

from dopr_lightning.cli import main
from dopr_lightning.project import Project

from {{ cookiecutter.package }}.data import Data
from {{ cookiecutter.package }}.module import Policy

PROJECT = Project(Policy, Data, command="python -m {{ cookiecutter.package }}")

if __name__ == "__main__":
    sys.exit(main(project=PROJECT))
