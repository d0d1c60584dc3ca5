# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-fast check-mutants lint types format clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and alone: pinned, it takes a local or CPU wheel where the index offers one.
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[worker,dev]'
	touch $@

demo: install
	$(BIN)/python -m demo.run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest

test-fast: install
	$(BIN)/pytest -m "not slow"

# Plants defects in a copy of sdpo_core and shows which test notices each; fails if one survives.
check-mutants: install
	$(BIN)/python tests/sdpo_core/mutants.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
