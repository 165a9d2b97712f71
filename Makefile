# Needs Linux on x86_64, make and Python >= 3.11. Everything else goes to .venv (3 GB); nothing is installed elsewhere.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
SEEDS ?= 0..100000
FOLDERS := bus router workers transport cluster lab
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --only-binary :all:
PYTEST := $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help venv serve model test check chaos-search lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo '  e.g.          make serve ARGS="--prefill 1 --decode 2 --engine sim"'

venv: $(VENV)/.hocket-installed ## build .venv (a few minutes the first time, instant after)

serve: venv ## run a whole cluster here; options in ARGS, listed by: make serve ARGS=--help
	@exec $(BIN)/hocket serve $(ARGS)

model: venv ## fetch and convert the demo model (93 MB, once), print its folder
	@$(BIN)/hocket model demo

test: check model ## everything that proves the tree: checks, then tests from fast to slow
	$(PYTEST) -m "not slow and not vllm"
	$(PYTEST) -m "slow and not vllm"
	$(PYTEST) -m vllm

check: venv ## format, lint, types, floors of the house, shape of the code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/test_architecture.py
	$(BIN)/python tools/measure_style.py $(FOLDERS) --check

chaos-search: venv ## 100,000 runs of a pool under faults, on virtual time; another range: make chaos-search SEEDS=0..1000
	$(BIN)/hocket lab chaos --seeds $(SEEDS)

lock: venv ## resolve requirements/cpu.in into requirements/cpu.lock again
	$(BIN)/python tools/lock.py

clean: ## remove .venv and whatever was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(FOLDERS) tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps, so that an edit of pyproject.toml does not install 180 packages again.
$(VENV)/.requirements-installed: requirements/cpu.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hocket needs Python >= 3.11, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { echo "the locked wheels are for Linux x86_64, this is $$(uname -sm)" >&2; exit 1; }
	@echo "building $(VENV) with $$($(PYTHON) --version) (a few minutes, 3 GB)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --only-binary :all: --no-deps -r requirements/cpu.lock | grep -vE '^(Requirement|Looking|Using cached)'
	@# torch: the CPU build from PyTorch's index where that answers, else whatever the configured index has, which may be the
	@# CUDA build: that one does not import without its libraries.
	@if $(BIN)/python -c 'import urllib.request as u; u.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
		echo "torch $(TORCH) from $(TORCH_CPU_INDEX)"; \
		$(PIP_INSTALL) --no-deps --index-url $(TORCH_CPU_INDEX) torch==$(TORCH); \
	else \
		echo "torch $(TORCH) from the configured index"; \
		$(PIP_INSTALL) --no-deps torch==$(TORCH); \
	fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP_INSTALL) --constraint requirements/cpu.lock torch==$(TORCH)
	@touch $@

$(VENV)/.hocket-installed: $(VENV)/.requirements-installed pyproject.toml setup.py
	@# Built with the setuptools of the lock. A new top-level folder changes setup.py and with it this target.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
