# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up themselves.
PYTHON ?= python3
BIN := .venv/bin

# The environment of a real vLLM for the tests; one that is there already can be named by PERENNIAL_VLLM_PYTHON.
VLLM_ENV := .venv-vllm

.PHONY: install vllm-env demo test test-fast check-swap check-gateway check-mutants lint types format clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and alone: pinned, it takes a local or CPU wheel where the index offers one.
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[worker,dev]'
	touch $@

vllm-env:
ifndef PERENNIAL_VLLM_PYTHON
	$(PYTHON) tests/vllm/install.py $(VLLM_ENV)
endif

demo: install
	$(BIN)/python -m demo.run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

test: lint types vllm-env
	$(BIN)/pytest

test-fast: install
	$(BIN)/pytest -m "not slow and not vllm"

# Swaps under load with a real vLLM; writes build/reports/swap.json.
check-swap: install vllm-env
	$(BIN)/pytest tests/vllm/test_swap.py -k sixty_seconds

# Overhead of the gateway against the engine asked directly: build/reports/gateway.json
check-gateway: install
	$(BIN)/python -m benchmarks.gateway

# Plants defects in a copy of sdpo_core and shows which test notices each; fails if one survives.
check-mutants: install
	$(BIN)/python tests/sdpo_core/mutants.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
