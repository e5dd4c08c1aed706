# One command each: `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS := .venv-peers
# Empty: the newest versions that pyproject.toml allows.
CONSTRAINTS := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install lock demo test check mutants up down bench clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

install: $(INSTALLED)  ## create .venv and install everything into it (about 5.5 GB with torch)

# To move on to newer versions: make clean; make install CONSTRAINTS= ; make test; make lock
lock: $(INSTALLED)  ## write constraints.txt: the exact versions that .venv has
	$(BIN)/python .ci/lock.py constraints.txt demo dev release transformers bench
	@touch $(INSTALLED)

demo: $(INSTALLED)  ## the whole recipe on real images in some eight minutes: two teachers, a proxy, a student
	$(BIN)/eupe run demo

# Three at a time, whatever cores there are: those that start a cluster wait a good part of their time.
test: $(INSTALLED)  ## every test; leaves no process behind
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)  ## format, lint (bandit's rules too), types, known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py constraints.txt

mutants: $(INSTALLED)  ## plant known faults in a copy, one at a time: a test must notice each
	$(BIN)/python tests/mutants/run.py

up: $(INSTALLED)  ## start Prefect, a worker and a Ray head here; then: . runs/local/env
	@$(BIN)/python -m flows.local_stack up

down:  ## stop what `make up` started
	@test ! -x $(BIN)/python || $(BIN)/python -m flows.local_stack down

bench: $(PEERS)/installed  ## reading speed beside numpy.memmap and eight other readers (an environment of its own: 5.5 GB more)
	$(PEERS)/bin/python -m benchmarks.read

clean: down  ## remove .venv and what the tools cached; runs/ (your caches and results) stays
	rm -rf $(VENV) $(PEERS) .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info build

# Installed again when pyproject.toml or the versions have changed since.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "eupe needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install python3-venv (apt-get install python3-venv)" >&2; exit 2; }
	@echo "installing into $(VENV) (pip's own words: $(VENV)/install.log)"
	@$(BIN)/python .ci/install.py $(VENV)/install.log $(addprefix -c ,$(CONSTRAINTS)) -e '.[demo,dev,release,transformers,bench]'
	@touch $@

# An environment of its own: mosaicml-streaming wants an older numpy than the rest.
$(PEERS)/installed: pyproject.toml
	@test -x $(PEERS)/bin/pip || $(PYTHON) -m venv $(PEERS)
	@echo "installing into $(PEERS) (pip's own words: $(PEERS)/install.log)"
	@$(PEERS)/bin/python .ci/install.py $(PEERS)/install.log -e '.[bench,peers]'
	@touch $@
