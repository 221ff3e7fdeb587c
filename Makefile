# Everything goes through .venv, which `make setup` keeps ready; no target needs another step before it.
# `make` alone prints the targets.

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
SUITES := tests/unit tests/property tests/replay tests/live tests/repo

# Where CI is set, silence must never pass for success: a live test that cannot run is a failure.
ifneq ($(CI),)
export VMATRACE_REQUIRE_LIVE ?= 1
endif

.PHONY: help setup demo test test-vm agree power mutate bench lint format docs notebooks wheel clean

help: ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: ## install what is missing: apt packages (as root), .venv, vmatrace with its tools
	@scripts/setup.sh

demo: setup ## trace a small program live and show what the kernel decided
	@scripts/demo.sh

test: setup ## run the tests: unit property replay live repo (under 5 minutes)
	@$(PYTEST) $(SUITES) $(ARGS)

test-vm: ## run the tests that boot other kernels in a guest
	@scripts/setup.sh cross
	@$(PYTEST) tests/vm -m vm --timeout 1800 $(ARGS)

agree: setup ## hold random operations on this kernel against the rules (N=1000000)
	@$(PYTHON) -m tests.conformance.agree $(or $(N),1000000) $(ARGS)

power: setup ## print which committed scenario or trace catches each rule
	@$(PYTHON) -m tests.conformance.power

mutate: setup ## mutate the rules and see whether a test notices (N=300)
	@$(PYTHON) -m tests.conformance.mutate $(or $(N),300) $(ARGS)

bench: setup ## measure capture, reader, ingest and overhead; print the ratios
	@$(PYTHON) -m tests.bench $(ARGS)

lint: setup ## check style and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: setup ## rewrite the Python files in the project's style
	@$(PYTHON) -m ruff check --fix-only --quiet .
	@$(PYTHON) -m ruff format .

docs: setup ## write the generated pages and headers again
	@$(PYTHON) scripts/generate.py --write

notebooks: setup ## run the notebooks from top to bottom
	@$(PYTEST) tests/repo/test_notebooks.py $(ARGS)

wheel: setup ## build the wheel into dist/
	@$(PYTHON) -m hatchling build --target wheel --directory dist

clean: ## remove everything that make has made
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
