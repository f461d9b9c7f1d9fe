# `make demo` and `make test` from a bare clone; both set everything up in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-all lint format clean

help:
	@echo "make setup   install the locked versions into .venv"
	@echo "make demo    make synthetic data, train DualRefNet on them, write a report (no network after setup)"
	@echo "make test    lint, types, and the tests but the slow ones"
	@echo "make test-all  the slow tests too"

setup: .venv/.ready

.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dualrefnet needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/dualrefnet demo --out runs/demo

test: lint
	$(BIN)/pytest -n auto -m "not slow"

test-all: lint
	$(BIN)/pytest -n auto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
