# `make test` and `make demo` set everything up in .venv the first time.
# PYTHON=/path/to/python3.11 names one; otherwise the first of 3.11, 3.12 and 3.13 that has the locked packages is taken.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_QUIETLY := install --quiet --disable-pip-version-check --no-deps
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
# Or each of the many processes compiles all of vLLM's and torch's modules anew, which takes it twenty seconds.
unexport PYTHONDONTWRITEBYTECODE

# Tests marked `slow` are left to `make test-all`.
QUICK := and not slow

.PHONY: test test-all demo setup lint docs format fast engine bench-quick clients next-vllm clean

test: lint docs fast engine

test-all: QUICK :=
test-all: lint docs fast engine

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread in each process: threads that wait for each other's cores cost more than they compute.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations 20
IN_TWO := -n 2 --dist loadfile

fast: setup
	$(PYTEST) $(IN_TWO) -m "not alone $(QUICK)" tests/fast

# Processes of the first run have a core each. A trainer, whose priority is low, would starve there.
engine: setup
	$(PYTEST) $(IN_TWO) -m "not trainer and not alone $(QUICK)" tests/engine
	ALL_CORES=1 $(PYTEST) $(IN_TWO) -m "trainer $(QUICK)" tests/engine
	$(PYTEST) -m "alone $(QUICK)" tests/engine

# Ten minutes, on a machine that does nothing else.
bench-quick: setup
	$(BIN)/python benchmarks/quick.py

demo: setup
	$(BIN)/python benchmarks/demo.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/installed

$(VENV)/installed: requirements/cpu.txt requirements/dev.txt requirements/vllm-metadata/setup.py requirements/setup.sh setup.py
	@requirements/setup.sh $(VENV) $(PYTHON)
	@touch $@

# The site in build/site; a warning is an error. MkDocs has an environment of its own.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/installed: requirements/docs.txt | setup
	$(BIN)/python -m venv .venv-docs
	.venv-docs/bin/python -m pip $(PIP_QUIETLY) -r requirements/docs.txt
	@touch $@

# Clients of other people's, for tests/engine/test_clients.py, apart from the engine's environment.
clients: .venv-clients/installed

.venv-clients/installed: requirements/clients.txt tests/clients/package-lock.json | setup
	$(BIN)/python -m venv .venv-clients
	.venv-clients/bin/python -m pip $(PIP_QUIETLY) -r requirements/clients.txt
	if command -v npm >/dev/null; then npm ci --prefix tests/clients --no-audit --no-fund; fi
	touch $@

# What another version means, without a GPU: make next-vllm VERSION=0.34.0 (CONTRIBUTING.md). It needs the network.
next-vllm: setup
	$(if $(VERSION),,$(error give a version: make next-vllm VERSION=0.34.0))
	$(BIN)/python requirements/next_vllm.py $(VERSION)

clean:
	rm -rf $(VENV) .venv-clients .venv-docs build/site tests/clients/node_modules
