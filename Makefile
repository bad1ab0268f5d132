# `make help` lists the targets. Every target that needs the virtual environment makes it first (tools/setup.sh).
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
RECORD ?= tests/record.json
BENCHMARKS ?= $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

VENV := .venv/bin
STAMP := .venv/.setup-stamp
# One torch thread per worker: the models of the tests are tiny, and the workers share the cores. By file, because runs of
# several ranks are fixtures of a file; in the order of tests/conftest.py, which begins with files that take long.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
HAS_GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)

.DEFAULT_GOAL := help
.PHONY: help setup fit test test-all lint format types bench clean

help: ## List these targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv, or bring it up to date with pyproject.toml and constraints.txt

$(STAMP): pyproject.toml constraints.txt tools/setup.sh
	@PYTHON="$(PYTHON)" tools/setup.sh
	@touch $@

fit: $(STAMP) ## Train the tiny recipe on this machine (ARGS="--trainer.max_steps=10" to change it)
	$(VENV)/python -m spd_lightning fit --config tiny $(ARGS)

test: lint types ## Lint, check types, run the tests that need no GPU and little time (ARGS="-k staircase")
	$(PYTEST) $(ARGS)

test-all: lint types ## The same with the slow tests, and the GPU tests where there is a GPU; writes tests/record.json
	SPD_TEST_RECORD=$(RECORD) $(PYTEST) -m "$(if $(HAS_GPU),,not gpu)" $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

format: $(STAMP) ## Let ruff format the code and mend what it can
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

types: $(STAMP) ## mypy over src
	$(VENV)/mypy

bench: $(STAMP) ## Run the measurements of benchmarks/ (BENCHMARKS=benchmarks/x.py for one)
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(VENV)/python $$script $(ARGS); done

clean: ## Remove packages and caches; runs/, .venv and what data_prep made in build/ stay
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info src/*.egg-info
	find src tests benchmarks data_prep -name __pycache__ -type d -prune -exec rm -rf {} +
