# `make test` and `make demo` set everything up in .venv the first time.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
TORCH_CPU := https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

# Tests marked `slow` are left to `make test-all`.
SELECTED := -m "not slow"

.PHONY: test test-all demo setup lint format fast engine clients clean

test: lint fast engine

test-all: SELECTED :=
test-all: lint fast engine

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread for each of two processes: threads that wait for each other's cores cost more than they compute.
fast: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --durations 20 $(SELECTED) tests/fast

engine: setup
	$(BIN)/pytest -q --durations 20 $(SELECTED) tests/engine

demo: setup
	$(BIN)/python benchmarks/demo.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/installed

$(VENV)/installed: requirements/cpu.txt requirements/dev.txt requirements/vllm-metadata/setup.py setup.py
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "Python 3.11 is needed, but '$(PYTHON)' is not one; install it, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/cpu.txt || $(PIP) --extra-index-url $(TORCH_CPU) -r requirements/cpu.txt
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-build-isolation ./requirements/vllm-metadata
	$(PIP) --no-build-isolation -e .
	touch $@

# Clients of other people's, for tests/engine/test_clients.py, apart from the engine's environment.
clients: .venv-clients/installed

.venv-clients/installed: requirements/clients.txt tests/clients/package-lock.json
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/clients.txt
	if command -v npm >/dev/null; then npm ci --prefix tests/clients --no-audit --no-fund; fi
	touch $@

clean:
	rm -rf $(VENV) .venv-clients tests/clients/node_modules
