# The one door for people and CI. Everything is installed into .venv, from pinned versions.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types bench clean

demo: .venv/runtime
	$(BIN)/spectrograph demo

test: lint types .venv/dev
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/python -m tests.bench --write

.venv/python: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Spectrograph needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/runtime: .venv/python pyproject.toml constraints.txt
	@echo "Installing Spectrograph and its libraries into .venv (some minutes, once)"
	$(INSTALL) --editable .
	@touch $@

.venv/dev: .venv/runtime
	$(INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
