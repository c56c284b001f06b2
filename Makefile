# make train   trains a NeRF of the built-in scene, evaluates it, and writes novel views of it below runs/bricks
# make test    runs the tests, but for those that take long
# make test-slow    runs those: whole trainings, killed runs, the documentation's Python
# make test-long    planted faults one at a time, 5,000 broken files for every reader, a run killed 25 times
# make docs    builds the site of docs/, the executed notebooks and the docstrings, in build/docs
# make dist    builds a wheel in dist/
# All first make a virtual environment, which takes a minute, and only again when pyproject.toml changes.
#
#   make train SCENE=lego DATA_DIR=~/nerf_synthetic ARGS="--preset=base --max_seconds=300"
#   make test JOBS=4 ARGS="-k hash"

PYTHON ?= python3
VENV ?= .venv
SCENE ?= bricks
DATA_DIR ?=
WORKDIR ?=
ARGS ?=
JOBS ?= 2

# The jax for the GPU that is here: CUDA 13 needs driver 580, an older driver gets CUDA 12, and no GPU no extra.
ifndef EXTRA
EXTRA := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | \
	awk -F. 'NR == 1 && $$1 ~ /^[0-9]+$$/ { print ($$1 >= 580 ? "cuda13" : "cuda12") }')
endif

comma := ,
RUN_STAMP := $(VENV)/.installed$(if $(EXTRA),-$(EXTRA))
DEV_STAMP := $(RUN_STAMP)-dev

.PHONY: train test test-slow test-long lint format docs dist clean

train: $(RUN_STAMP)
	$(VENV)/bin/python -m jaxngp.train $(strip --scene=$(SCENE) $(DATA_DIR:%=--data_dir=%) $(WORKDIR:%=--workdir=%) $(ARGS))

test: $(DEV_STAMP)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist=loadfile -m "not slow" $(ARGS)

test-slow: $(DEV_STAMP)
	$(VENV)/bin/python -m pytest -n $(JOBS) -m slow $(ARGS)

test-long: $(DEV_STAMP)
	$(VENV)/bin/python -m experiments.mutants --jobs=$(JOBS)
	JAXNGP_FUZZ=5000 $(VENV)/bin/python -m pytest -n $(JOBS) -m fuzz $(ARGS)
	JAXNGP_KILLS=25 $(VENV)/bin/python -m pytest tests/test_crashes.py

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(DEV_STAMP)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: $(DEV_STAMP)
	$(VENV)/bin/python -m pip install --quiet --editable ".[docs]"
	$(VENV)/bin/python -m sphinx -b html -W --keep-going -q docs build/docs
	@echo build/docs/index.html

dist: $(VENV)/bin/python
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist

clean:  # leaves runs/, which is your work
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find jaxngp tests experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The check is Python that any version parses, so that an old one says what is wrong.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		"jaxngp needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=<a newer one>" % v[:2] or 0)'
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable ".$(if $(EXTRA),[$(EXTRA)])"
	@touch $@

$(DEV_STAMP): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev$(if $(EXTRA),$(comma)$(EXTRA))]"
	@touch $@ $(RUN_STAMP)
