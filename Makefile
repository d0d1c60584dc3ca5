# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up themselves.
PYTHON ?= python3
BIN := .venv/bin

# The environment of a real vLLM for the tests; one that is there already can be named by PERENNIAL_VLLM_PYTHON.
VLLM_ENV := .venv-vllm

# Each worker process of pytest takes whole files.
TOGETHER := --numprocesses=2 --dist=loadfile

.PHONY: install vllm-env demo test test-together test-fast check-swap check-gateway check-ingest check-claim check-mutants check-power \
  check-model check-kill bench bench-economy experiments lint types format clean

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

# Two files of tests at a time while vLLM's environment is fetched; then those that want the machine to themselves.
test: lint types
	$(MAKE) --jobs=2 vllm-env test-together
	$(BIN)/pytest -m alone

test-together: install
	$(BIN)/pytest $(TOGETHER) -m "not alone"

test-fast: install
	$(BIN)/pytest $(TOGETHER) -m "not slow and not vllm"

# A minute of swaps under load with a real vLLM, of which the tests run a third; writes build/reports/swap.json.
check-swap: install vllm-env
	PERENNIAL_SWAP_SECONDS=60 $(BIN)/pytest tests/vllm/test_swap.py -k every_three_seconds

# Overhead of the gateway against the engine asked directly, a synthetic one and a real vLLM: build/reports/gateway.json
check-gateway: install vllm-env
	$(BIN)/python -m benchmarks.gateway --vllm start

# The training step, fast against plain against a plain baseline, on one thread: build/reports/bench.json, docs/speed.svg
bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step

# A worker's jobs of 1, 4 and 16 adapters, alone and sharing the base's passes, cold and warm: build/reports/economy.json
bench-economy: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.economy

# Feedback in: exactness, rate and latency against a request that does nothing: build/reports/ingest.json
check-ingest: install
	$(BIN)/python -m benchmarks.ingest

# Claim time with up to 100,000 queued jobs, and the share of each tenant: build/reports/claim.json
check-claim: install
	$(BIN)/python -m benchmarks.claim

# Plants defects in copies of the library and of the queue, and shows which test notices each; fails if one survives.
check-mutants: install
	$(BIN)/python -m tests.sdpo_core.mutants
	$(BIN)/python -m tests.durability.mutants

# Cuts the power, simulated, while the store and the worker write: build/reports/power.json
CUTS ?= 50000
SEED ?= 1
check-power: install
	$(BIN)/python -m tests.durability.power --cuts $(CUTS) --seed $(SEED)

# Every interleaving of lease, commit and publish, within bounds, on the store's own functions: build/reports/model.json
STATES ?= 1000000
check-model: install
	$(BIN)/python -m tests.durability.model --states $(STATES)

# Kills and freezes every part at every point of a job's path, on both databases: build/reports/kill.json
RUNS ?= 200
check-kill: install
	$(BIN)/python -m tests.durability.kill --runs $(RUNS) --seed $(SEED)

# The experiment record: runs what docs/experiments/results.jsonl lacks and writes docs/experiments.md. All of it from
# nothing (remove that file) takes over an hour of one core; a part: python -m benchmarks.learning --only alpha
experiments: install
	$(BIN)/python -m benchmarks.learning

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
