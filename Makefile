# One command each: `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS := .venv-peers
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check up down bench clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

install: $(INSTALLED)  ## create .venv and install everything into it (about 5.5 GB with torch)

demo: $(INSTALLED)  ## the whole recipe on real images in about ten minutes: two teachers, a proxy, a student
	$(BIN)/eupe run demo

test: $(INSTALLED)  ## every test; leaves no process behind
	$(BIN)/pytest

check: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

up: $(INSTALLED)  ## start Prefect, a worker and a Ray head here; then: . runs/local/env
	@$(BIN)/python -m flows.local_stack up

down:  ## stop what `make up` started
	@test ! -x $(BIN)/python || $(BIN)/python -m flows.local_stack down

bench: $(PEERS)/installed  ## reading speed beside numpy.memmap and eight other readers (an environment of its own: 5.5 GB more)
	$(PEERS)/bin/python -m benchmarks.read

clean: down  ## remove .venv and what the tools cached; runs/ (your caches and results) stays
	rm -rf $(VENV) $(PEERS) .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info build

# Installed again when pyproject.toml has changed since.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "eupe needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install python3-venv (apt-get install python3-venv)" >&2; exit 2; }
	$(BIN)/pip install -e '.[demo,dev,bench]'
	@touch $@

# An environment of its own: mosaicml-streaming wants an older numpy than the rest.
$(PEERS)/installed: pyproject.toml
	@test -x $(PEERS)/bin/pip || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -e '.[bench,peers]'
	@touch $@
