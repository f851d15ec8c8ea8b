# make run    set up, then train and evaluate a DEMix model on text found on this machine
# make test   set up, then all tests
# make check  set up, then lint, types and the fast tests
# make format rewrite the code in the project's format
# make torture  set up, then the long tests: fuzzing, and damage to every file (an hour)
# make lock   rewrite the hashes in requirements/, docs/licenses.md and requirements/sbom.json

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check --progress-bar off
export TF_CPP_MIN_LOG_LEVEL ?= 3

FUZZ_SECONDS ?= 60  # for each of some fifty readers
.PHONY: run test check format torture lock

run: $(VENV)/.run
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quick.sh

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

torture: $(VENV)/.dev
	$(BIN)/python -m torture corrupt
	$(BIN)/python -m torture fuzz --seconds $(FUZZ_SECONDS)

lock: $(VENV)/.dev
	PYTHON=$(PYTHON) bash requirements/lock.sh

$(VENV)/.run: requirements/run.txt pyproject.toml
	@echo "setting up $(VENV): about 3 GB of pinned packages, one or two minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/run.txt
	$(PIP) --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	$(PIP) -r requirements/dev.txt
	@touch $@
