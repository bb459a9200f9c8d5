# Everything needs only python >= 3.11, make and git. PYTHON=... chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart install dev test test-slow test-newest lint format papers lab lab-gpu clean

quickstart: $(VENV)/.run
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The fast tests on the newest JAX, which may want a newer Python: make test-newest PYTHON=python3.13
test-newest:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and \
	  "the newest JAX wants Python 3.12 or newer: make test-newest PYTHON=python3.13")'
	$(MAKE) dev VENV=.venv-newest PYTHON=$(PYTHON)
	.venv-newest/bin/python -m pip install --quiet --upgrade jax flax optax orbax-checkpoint
	.venv-newest/bin/python -m pip list | grep -i -E '^(jax|jaxlib|flax|optax|orbax-checkpoint) '
	$(MAKE) test VENV=.venv-newest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The README's table of papers, from the records in the code.
papers: $(VENV)/.dev
	$(BIN)/python -m efficient.papers --write-readme

# What the TPU compilers make of every kernel, into docs/kernels.md; minutes.
lab: $(VENV)/.dev
	$(BIN)/python -m pallas_kernels.lab --write docs/kernels.md

# NVIDIA's compilers, for plans and kernels on h200: 4.5 GB, no GPU needed.
lab-gpu: .venv-gpu/.done
.venv-gpu/.done: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet -e ".[cuda]"
	touch $@

install: $(VENV)/.run
dev: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) .venv-newest .venv-gpu runs build *.egg-info
