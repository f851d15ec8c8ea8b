# make run    set up, then train and evaluate a DEMix model on text found on this machine
# make test   set up, then all tests
# make interop set up, then compare with other libraries (PyTorch, transformers, lm-eval, openai)
# make check  set up, then lint, types and the fast tests
# make format rewrite the code in the project's format
# make torture  set up, then the long tests: damage, kills, loss of power, full disks, fuzzing, a soak (3 hours)
# make lock   rewrite the hashes in requirements/, docs/licenses.md and requirements/sbom.json

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --no-compile --disable-pip-version-check --progress-bar off
PIP := $(BIN)/python $(INSTALL)
INTEROP := .venv-interop
export TF_CPP_MIN_LOG_LEVEL ?= 3

FUZZ_SECONDS ?= 60  # for each of some fifty readers

.PHONY: run test check interop format torture lock

run: $(VENV)/.run
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quick.sh

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

interop: $(INTEROP)/.done
	$(INTEROP)/bin/python -m pytest interop -n 2 --dist worksteal

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

torture: $(VENV)/.dev
	$(BIN)/python -m torture corrupt
	$(BIN)/python -m torture power
	$(BIN)/python -m torture kill
	$(BIN)/python -m torture resources
	$(BIN)/python -m torture fuzz --seconds $(FUZZ_SECONDS)
	$(BIN)/python -m torture soak --out runs/soak-$$(date +%Y%m%d-%H%M%S)

lock: $(VENV)/.dev
	PYTHON=$(PYTHON) bash requirements/lock.sh

$(VENV)/.run: requirements/run.txt pyproject.toml
	@echo "setting up $(VENV): about 1 GB of pinned packages, a minute"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/run.txt
	$(PIP) --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	$(PIP) -r requirements/dev.txt
	@touch $@

# PyTorch's own index has a build for CPUs only; PyPI's brings 3 GB for GPUs, and serves where the
# other is out of reach. A pin takes either.
$(INTEROP)/.done: requirements/interop.txt pyproject.toml
	@echo "setting up $(INTEROP): about 2 GB of pinned packages, one or two minutes"
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python $(INSTALL) --retries 1 --no-deps \
		--extra-index-url https://download.pytorch.org/whl/cpu $$(grep -oE "^torch==[^ ]+" $<)
	$(INTEROP)/bin/python $(INSTALL) --no-deps -r $<
	$(INTEROP)/bin/python $(INSTALL) --no-deps -e .
	@touch $@
