# `make demo` and `make test` need nothing but Python 3.11 or newer and a package index; everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODELS ?= smollm2
RESULTS := benchmarks/results
MEASURED = $(patsubst %,$(RESULTS)/%.json,$(patsubst %.gguf,%,$(notdir $(MODELS))))
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test kernels test-gpu check lint types contracts chaos soak fuzz bench lock audit clean

help:
	@echo "make demo    download a small model, start a server and a worker, run two jobs"
	@echo "make test    run the whole test suite; no GPU needed"
	@echo "make check   run what CI runs: lint, types, import contracts, tests, kernels, 3 minutes of chaos"
	@echo "make chaos   kill workers and the server and disturb the network at random, then check all event streams: [SEED=n] [MINUTES=m] [RUNNING=n] [GAP=s]"
	@echo "make soak    load a server, workers and a gateway, and compare each figure with its bound: [NAMES='backlog memory …']"
	@echo "make fuzz    search for inputs that crash, hang or exhaust a decoder: [TARGET=name] [RUNS=n]"
	@echo "make test-gpu  run the GPU suite; needs an NVIDIA GPU: [PART=ops|models|full|faults|sanitize] [SYNTH=file]"
	@echo "make bench   measure models, by default SmolLM2: [MODELS='a.gguf b.gguf']"
	@echo "make lock    pin all dependencies in requirements/*.txt: [UPGRADE=1]"
	@echo "make audit   look up the pinned versions' known vulnerabilities; needs PyPI's JSON API"
	@echo "make clean   remove .venv and caches; keep pulled models"

demo: $(VENV)/.installed
	@$(BIN)/worker demo

# One BLAS thread: the matrices of the tests are small, and more threads contend on a busy machine.
test: $(VENV)/.installed-dev
	@$(BIN)/worker pull smollm2
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -m "not kernels"

# Compile every kernel in every form for sm_80, sm_90 and sm_100 with the NVRTC wheel; no GPU needed.
kernels: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m kernels

# Needs an NVIDIA GPU and `.venv/bin/pip install '.[gpu]'`. PART is ops, models, full, faults or
# sanitize. SYNTH is a script that writes the full-size files that the cache lacks.
test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m tests.gpu.suite $(PART) $(if $(SYNTH),--synth $(SYNTH))

# One seed, so that two runs of one commit inject the same faults.
check: lint types contracts test kernels
	@$(MAKE) --no-print-directory chaos SEED=7563 MINUTES=3

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

# Without SEED a seed is drawn and printed.
chaos: $(VENV)/.installed-dev
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(RUNNING),--max-running $(RUNNING)) $(if $(GAP),--gap $(GAP))

soak: $(VENV)/.installed-dev
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.soak $(NAMES)

# Coverage-guided, with atheris; RUNS is the number of executions of each target, by default 1,000,000.
fuzz: $(VENV)/.installed-dev
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(TARGET) $(if $(RUNS),--runs $(RUNS))

# Write one file for each model to benchmarks/results, plot them and print their tables.
# docs/performance.md describes how its tables are generated.
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

# Extras and groups that each lock file pins; requirements/build.txt pins the build system.
LOCK_cpu := --extra gateway --extra tracing
LOCK_gpu := --extra gateway --extra tracing --extra gpu
LOCK_gpu-cuda12 := --extra gateway --extra tracing --extra gpu-cuda12
LOCK_dev := --extra gateway --extra tracing --extra embedded --extra top --group dev
LOCKS := $(patsubst %,requirements/%.txt,cpu gpu gpu-cuda12 dev build)

lock: $(LOCKS)

.PHONY: $(LOCKS)
$(LOCKS): requirements/%.txt: $(VENV)/.installed-dev
	@$(BIN)/uv pip compile $(if $(LOCK_$*),pyproject.toml $(LOCK_$*),requirements/build.in) --output-file $@ --quiet \
		--universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

# --strict: a version whose record cannot be read is an error, not a success.
audit: $(VENV)/.installed-dev
	@for lock in $(LOCKS); do \
		$(BIN)/uv tool run --from 'pip-audit>=2.9' pip-audit --strict --require-hashes --disable-pip --requirement $$lock || exit 1; \
	done

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
	$(PIP) install --quiet --editable '.[embedded,gateway]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet --editable '.[embedded,gateway]' --group dev
	@touch $@ $(VENV)/.installed
