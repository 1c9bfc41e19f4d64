# Two commands, from a machine with Python 3.11 and make alone:
#   make quickstart   creates .venv, installs, and runs the main job
#   make test         the same, then the whole test suite
# make docs builds the site into docs/_build.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: quickstart test lint docs clean

quickstart: $(INSTALLED)
	$(BIN)/dopr compare --config walker2d.yaml --optimizers adamw,dopr-adamw --seeds 0,1 --output runs/quickstart

test: quickstart lint
	$(BIN)/pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --builder html docs docs/_build

# torch and torchvision in one call and from one index: their builds must match.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
