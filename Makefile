# make demo: the whole job on this machine's CPU; make test: lint, types and tests. Both set up what they need first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test test-gpu test-slurm lint types unit integration setup lock clean

demo: setup
	$(BIN)/python -m launch.run experiment=demo

test: lint types unit integration $(if $(shell command -v slurmctld),test-slurm)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest -n 2 tests/unit

integration: setup
	$(BIN)/pytest -n 2 --dist loadgroup tests/integration tests/gpu

test-gpu: ## in the container, or wherever CUDA, Transformer Engine and the stack are installed
	python -m pytest tests/gpu

test-slurm: setup ## as root, with Debian's slurm-wlm and munge: two workers, each with a cluster of its own on loopback
	$(BIN)/pytest -n 2 tests/slurm

setup: $(INSTALLED)

$(INSTALLED): requirements/cpu.in requirements/dev.in requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit("error: Python 3.11 is needed, $(PYTHON) is %d.%d; set it with make PYTHON=/path/to/python3.11" % v)'
	@echo "setup 1/4: virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup 2/4: PyTorch"
	@$(PIP) install -q "$$(grep '^torch==' requirements/cpu.lock)"
	@echo "setup 3/4: NeMo, Megatron-Core, ModelOpt and what they need (about 2.5 GB, some minutes)"
	@$(PIP) install -q -r requirements/cpu.in -r requirements/dev.in -c requirements/cpu.lock
	@echo "setup 4/4: this repository, and a check that nothing conflicts"
	@$(PIP) install -q --no-deps -e .
	@$(PIP) check
	@touch $@

lock: ## pins what pip chooses today for the .in files, in a fresh environment
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install -q "$$(grep '^torch==' requirements/cpu.in)"
	.lock-venv/bin/pip install -q -r requirements/cpu.in -r requirements/dev.in
	{ sed '/^[^#]/,$$d' requirements/cpu.lock; .lock-venv/bin/pip freeze | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > requirements/cpu.lock.new
	mv requirements/cpu.lock.new requirements/cpu.lock
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
