# Two commands, from a machine with Python 3.11 and make alone:
#   make quickstart   creates .venv, installs, and runs the main job
#   make test         the same, then the whole test suite
# make docs builds the site into docs/_build.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: quickstart test lint docs wheel template clean

quickstart: $(INSTALLED)
	$(BIN)/dopr compare --config walker2d.yaml --optimizers adamw,dopr-adamw --seeds 0,1 --output runs/quickstart

# The longest tests come last: without stealing, one worker is left with most of them.
test: quickstart lint
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --builder html docs docs/_build

# torch and torchvision in one call and from one index: their builds must match.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch torchvision
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# The package as its users get it: built, installed with the base dependencies alone, and run where no repository is.
CLEAN := build/clean
wheel:
	rm -rf dist $(CLEAN)
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/pip install --quiet --constraint $(CONSTRAINTS) torch torchvision
	$(CLEAN)/bin/pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	cd $(CLEAN) && bin/dopr fit --config walker2d.yaml --config dopr.yaml --trainer.max_steps 60 --rollout.report_episodes 2

# A project from the template in an environment of its own, with this checkout for its library: its two commands.
template: $(INSTALLED)
	rm -rf build/project
	$(BIN)/dopr new "Robot Policy" --output build/project
	PIP_CONSTRAINT='$(abspath $(CONSTRAINTS))' $(MAKE) -C build/project/robot-policy quickstart test LIBRARY='$(CURDIR)'

clean:
	rm -rf $(VENV) build dist docs/_build runs
