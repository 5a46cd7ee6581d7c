# One command each; nothing needs to be installed before but Python (3.10 or newer) and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help demo test lint types unit format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(STAMP)  ## train a 135M-parameter model on movie reviews (a quarter of an hour on two CPU cores)
	$(BIN)/r2m demo

test: lint types unit  ## everything a change must pass

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP)  ## pytest
	$(BIN)/pytest -q

format: $(STAMP)  ## apply ruff's format and safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environment, caches and runs
	rm -rf .venv build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# The tested set of packages, in an environment of this folder.
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@
