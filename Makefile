# One command each; nothing needs to be installed before but Python (3.10 or newer) and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help demo test lint types unit interpret gate gpu-test format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(STAMP)  ## train a 135M-parameter model on movie reviews (a quarter of an hour on two CPU cores)
	$(BIN)/r2m demo

test: lint types unit interpret gate  ## everything a change must pass; needs no GPU

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP)  ## pytest
	$(BIN)/pytest -q

interpret: $(STAMP)  ## the operators' tests on the Triton kernels, in Triton's interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest -q tests/kernels --impl triton

gate: $(STAMP)  ## compile every Triton kernel for every GPU and judge the machine code
	$(BIN)/python tests/offline/gate.py

# With the packages that are there, on a machine with a CUDA build of torch: PYTHON is the one that has them.
gpu-test:  ## the operators' tests on a GPU, and those that only a GPU can run
	$(PYTHON) -m pytest -q tests/kernels --impl triton --device cuda
	$(PYTHON) -m pytest -q tests/gpu

format: $(STAMP)  ## apply ruff's format and safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environment, caches and runs
	rm -rf .venv build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# The tested set of packages, in an environment of this folder.
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,dev,triton]'
	@touch $@
