# Each target does its own set-up: a fresh machine needs Python 3.11+, git and make, nothing else.
#
#   make demo     train a small network with dtp, predsim and bp; certificates, ONNX, a table
#   make test     the test suite              make slow     the long and the GPU tests as well
#   make property the property tests on thousands of drawn programs (hours)
#   make mutants  plant leaks in every method's graphs and mistakes in its plans: each must be found (ten minutes)
#   make lint     ruff and mypy --strict      make format   let ruff rewrite the sources
#   make bench    local against end-to-end, and its figures in docs (ten minutes or so on two cores of its own)
#   make bench-gpu the same by backend, and offload="cpu", where there is a GPU
#   make reproduce published networks on MNIST, each beside bp, and a GPT: docs/results.md (half an hour)
#   make defaults what each method reaches on MNIST with its defaults (hours)
#   make sweep    every method on a model of each family of torchvision, timm and transformers: docs/models.md (hours)
#   make pages    write docs/methods: a page for each method, and Table I of all (half a minute)
#   make clean    remove the environment and the caches
#
#   make test ARGS="tests/passes -k dtp"      passes arguments on to the command behind a target

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
WORKERS ?= 2
SOURCES := locc passes tests examples benchmarks

.PHONY: help setup demo test slow property mutants lint format bench bench-gpu reproduce defaults sweep pages clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)

# A candidate is run, not only looked up: a version manager's shim may exist and fail.
define FIND_PYTHON
python=; \
for candidate in $${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do \
    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
            </dev/null >/dev/null 2>&1; then \
        python=$$candidate; break; \
    fi; \
done; \
if [ -z "$$python" ]; then \
    echo "error: locc needs Python 3.11, 3.12 or 3.13 with its venv module; tried $${PYTHON:-what is on PATH} in vain." >&2; \
    echo "       Install one (Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; \
    exit 1; \
fi
endef

$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version </dev/null >/dev/null 2>&1; then \
	    $(FIND_PYTHON); \
	    echo "set-up: making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	@echo "set-up: installing what constraints.txt pins (a minute or two, once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/python -m examples.demo $(ARGS)

# One thread per worker: two workers with a thread each beat one process with two on tensors as small as a test's.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

slow: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "" $(ARGS)

property: $(READY)
	@LOCC_PROFILE=nightly OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/property -n $(WORKERS) $(ARGS)

mutants: $(READY)
	@PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m mutants.run --workers $(WORKERS) $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --quiet --check $(SOURCES)
	@$(BIN)/mypy --strict

format: $(READY)
	@$(BIN)/ruff check --quiet --fix-only $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

# The processor's time on one thread is much the same on a busy machine; what is compiled uses all cores.
bench: $(READY)
	@mkdir -p out
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.run --processor --json out/bench.json $(ARGS)
	@$(BIN)/python -m benchmarks.pipeline --rounds 3 --json out/pipeline.json
	@$(BIN)/python -m benchmarks.plots

bench-gpu: $(READY)
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

defaults: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/locc reproduce defaults --budget full --page docs/results.md $(ARGS)

reproduce: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/locc reproduce --page docs/results.md $(ARGS)

pages: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pages $(ARGS)

# What the sweep needs beside the rest is large, so it is installed when it is asked for; what is done is not done again.
sweep: $(READY)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e '.[sweep]'
	@$(BIN)/python -m benchmarks.sweep --workers $(WORKERS) $(ARGS)

clean:
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist out
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
