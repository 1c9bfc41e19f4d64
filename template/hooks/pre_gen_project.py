"""Refuse answers that would make a broken project, in one line."""

import keyword
import math
import re
import sys

SLUG = {{ cookiecutter.project_slug|tojson }}
PACKAGE = {{ cookiecutter.package|tojson }}
DAMPING = {{ cookiecutter.damping|tojson }}
TAKEN = sys.stdlib_module_names | {"dopr_lightning", "lightning", "numpy", "pytest", "torch"}

if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", SLUG):
    sys.exit(f"error: project_slug must be lowercase letters and digits, joined by single hyphens, got {SLUG!r}")
if not re.fullmatch(r"[a-z][a-z0-9_]*", PACKAGE) or keyword.iskeyword(PACKAGE):
    sys.exit(f"error: package must be a lowercase Python identifier, got {PACKAGE!r}")
if taken := {SLUG.replace("-", "_"), PACKAGE} & TAKEN:
    sys.exit(f"error: {taken.pop()!r} is a library that the project uses; choose another name")
try:
    positive = 0 < float(DAMPING) < math.inf
except ValueError:
    positive = False
if not positive:
    sys.exit(f"error: damping must be a positive number, got {DAMPING!r}")
