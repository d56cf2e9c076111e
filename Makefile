# `make` alone lists the targets. Needs Python 3.11 or newer and git; everything else goes into .venv.

PYTHON ?= python3
DATA ?= ../shared/data/pbc28.npz

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# pip's own variables of the surrounding shell stay in force; a foreign virtual environment does not.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH
# Else each of the hundred programs that tests and DVC start would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo deps check test bench bench-quick ui pbc28 clean

help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(STAMP) ## create .venv and install the package with its pinned dependencies
	@:

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with: make setup PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## run everything on six generated hospitals and print the table of answered queries
	@python -m pipelines.dependencies
	@qkt phantom
	@qkt repro
	@qkt summary

deps: setup ## write down of what code each stage is made (pipelines/code/), for DVC
	@python -m pipelines.dependencies

# One thread a worker of pytest; mypy runs beside them.
PYTEST := -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
COVERAGE := .coverage.json

check: setup ## for every change, under 2 minutes: ruff, mypy, tests without training, servers and programs
	@ruff check .
	@ruff format --check .
	@mypy --strict qkt_clinical & typed=$$!; OMP_NUM_THREADS=1 pytest $(PYTEST) -m 'not nightly and not slow'; wait $$typed

test: setup ## ruff, mypy and the whole test suite, with its coverage; offline
	@ruff check .
	@ruff format --check .
	@mypy --strict qkt_clinical & typed=$$!; \
	  OMP_NUM_THREADS=1 python -m slipcover --source qkt_clinical --json --out $(COVERAGE) -m pytest $(PYTEST); \
	  wait $$typed
	@python -c "import json; total = json.load(open('$(COVERAGE)'))['summary']['percent_covered']; \
	  print(f'qkt_clinical: {total:.1f} % of its lines are covered ($(COVERAGE) says which)')"

bench: setup ## ratios of speed and size beside their bars, about half an hour; fails if one is missed
	@OMP_NUM_THREADS=1 python -m benchmarks.speed

bench-quick: setup ## the same on little, where no time is judged
	@OMP_NUM_THREADS=1 python -m benchmarks.speed --quick

ui: setup ## MLflow in the browser, on http://127.0.0.1:5000
	@mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

pbc28: setup ## the same on real blood-cell images: make pbc28 DATA=FILE.npz
	@qkt federate '$(DATA)' --preset pbc28 --out runs/pbc28
	@cd runs/pbc28 && qkt repro && qkt summary

# Removes a hospital's data only where 'qkt phantom' generated it: other folders hold a user's own.
clean: ## remove what runs generated; keeps the environment and your own hospitals' data
	@rm -rf data models reports runs mlartifacts .qkt .dvc/cache .dvc/tmp build
	@rm -f mlflow.db*
	@for marker in hospitals/*/.phantom.json; do \
	  [ -e "$$marker" ] || continue; rm -rf "$${marker%/.phantom.json}/data" "$$marker"; \
	done
