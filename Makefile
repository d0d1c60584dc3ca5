# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-fast lint types format clean check-gateway

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

# Overhead of the gateway against the engine asked directly: build/reports/gateway.json
check-gateway: install
	$(BIN)/python -m benchmarks.gateway

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
