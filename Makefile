# The study's commands. Needs Python >= 3.11, GNU make, a C++ compiler and disk space for PyTorch; `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= laptop
DATA ?=
CHECKPOINT ?=
ARGS ?=
TEST_BUDGET_S ?= 60

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install reproduce test lab lock clean

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BASELINES := $(VENV)/.baselines
ENGINES := $(VENV)/.engines

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 19
	@echo
	@echo '  variables: PYTHON=python3.12   the interpreter that the environment is made from'
	@echo '             PROFILE=laptop      a file of notebooks/profiles'
	@echo '             DATA=/path          folder of the data sets, for profiles that need one'
	@echo '             CHECKPOINT=/path    a published checkpoint, e.g. sp0.80-ts32.pth: evaluate it, train nothing'
	@echo '             ARGS="-p seeds=[0]" more options for the pipeline; see make reproduce ARGS=--help'

install: $(STAMP)  ## create .venv with the pinned dependencies and this package, editable

# Runs again when the dependencies change. An environment that lost its interpreter or has no pip is made anew.
$(STAMP): pyproject.toml requirements.lock
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo 'error: $(PYTHON) was not found; install Python >= 3.11 or name one: make install PYTHON=/path/to/python' >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), expected Python >= 3.11; name another:" \
	    "make install PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --editable .
	@touch $@

# Other people's GPU kernels, which only the profile gpu compares with; it measures the others where these are missing.
# Held to the lock, so that they cannot move what it pins.
$(BASELINES): $(STAMP)
	@if $(BIN)/python -m pip install --constraint requirements.lock --editable '.[baselines]'; then touch $@; else \
	  echo "warning: the baselines torchao and blksprs could not be installed; they will be missing in the comparison" >&2; \
	fi

# The dense baselines of a CPU, as soft as those; the notebooks' own values are the profile laptop's, so the tests take them.
$(ENGINES): $(STAMP)
	@if $(BIN)/python -m pip install --constraint requirements.lock --editable '.[engines]'; then touch $@; else \
	  echo "warning: ONNX Runtime and OpenVINO could not be installed; they will be missing in the comparison" >&2; \
	fi

reproduce: $(STAMP) $(if $(filter gpu,$(PROFILE)),$(BASELINES)) $(if $(filter laptop bf16_cpu,$(PROFILE)),$(ENGINES))  ## run all notebooks in order; write tables, figures and a report
	@$(BIN)/python -m blockvit.pipeline --profile "$(PROFILE)" $(if $(DATA),--data "$(DATA)") $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

# Every step runs, whatever failed before it. The notebooks start from empty folders, so that they measure, but less than
# `make reproduce` does: each sweep ends with the group that is on after $(TEST_BUDGET_S) seconds. Files of tests run side by
# side, one a core and with one thread each: more would wait for each other.
test: $(STAMP) $(if $(filter laptop,$(PROFILE)),$(ENGINES))  ## lint, run the tests, and run the notebooks from nothing
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && mkdir "$$work"/{logs,results,figures} || exit 1; \
	failed=; \
	step() { \
	  local name=$$1; shift; \
	  printf '\n== %s\n' "$$name"; \
	  "$$@" 2>&1 | tee "$$work/logs/$$name" || failed+=" $$name"; \
	}; \
	step lint $(BIN)/ruff check .; \
	step format $(BIN)/ruff format --check .; \
	step tests env OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile; \
	step notebooks env BLOCKVIT_RESULTS="$$work/results" BLOCKVIT_FIGURES="$$work/figures" \
	  BLOCKVIT_BUDGET_S=$(TEST_BUDGET_S) \
	  $(BIN)/python -m pytest notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 \
	  --nbval-kernel-startup-timeout=600; \
	printf '\n== summary\n'; \
	for name in lint format tests notebooks; do \
	  printf '%-10s %s\n' "$$name" "$$(tail -n 1 "$$work/logs/$$name")"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

lab: $(STAMP)  ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab notebooks

# Resolved for every platform and Python >= 3.11, from the default index alone: this machine's settings must not leak in.
# Pins that still fit are kept; `make lock ARGS=--upgrade` moves them. Only this target needs uv.
lock:  ## resolve requirements.lock anew from pyproject.toml (needs uv: pip install uv)
	@command -v uv >/dev/null || { echo 'error: uv was not found; install it with: pip install uv' >&2; exit 1; }
	@env -u UV_INDEX -u UV_DEFAULT_INDEX -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS \
	  uv pip compile --no-config --quiet --universal --python-version 3.11 --extra study --extra test --no-annotate \
	  --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS) pyproject.toml

clean:  ## remove executed notebooks, reports and caches; the environment, downloads and tables stay
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find lib tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
