# The project's commands. `make demo` needs git, make, Python 3.11 or newer, and pip.

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
TEST_EXTRAS ?= test,live,ray-serve
PYTEST_ARGS ?=
# A file's tests stay in one process, as they share what they set up; the files are spread over the cores.
SPREAD      := --numprocesses auto --maxprocesses 4 --dist loadfile --benchmark-disable
# Which lines the tests ran. What numba compiles runs outside Python's sight. Slipcover is imported before pytest can rewrite it.
COVERAGE    := -m slipcover --source hybridsd_sim,executors --omit '*/recursion.py,*/replay.py' --skip-covered --missing-width 48
COVERED     := $(COVERAGE) -m pytest -W ignore::pytest.PytestAssertRewriteWarning

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --quiet --no-input --disable-pip-version-check
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test check check-slow bench gpu structure hooks wheel clean

help:  ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.base  ## Plan the quickstart scenario and write its report
	$(BIN)/hybridsd-sim plan scenarios/quickstart.yaml

test: $(VENV)/.test  ## Run the tests
	$(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

check: $(VENV)/.test  ## Lint, check types and layers, then run the tests and say which lines they missed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict hybridsd_sim executors
	$(BIN)/lint-imports
	$(BIN)/python $(COVERED) $(SPREAD) $(PYTEST_ARGS)

check-slow: $(VENV)/.test  ## Run the laws that take minutes
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

bench: $(VENV)/.test  ## Run the benchmarks
	$(BIN)/python -m pytest tests/benchmarks $(PYTEST_ARGS)

gpu: $(VENV)/.test  ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

structure: $(VENV)/.test  ## Print how the code is built, in figures
	$(BIN)/python tests/structure.py

hooks: $(VENV)/.test  ## Run the linters before every commit
	$(BIN)/pre-commit install

wheel: $(VENV)/.test  ## Build the source distribution and the wheel into dist/
	$(BIN)/hatchling build

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find executors hybridsd_sim tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Some distributions ship Python without ensurepip; there the system's pip puts a pip into the environment.
$(BIN)/activate:
	@echo "$(PYTHON) -m venv $(VENV)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --quiet --disable-pip-version-check --python $(BIN)/python install pip; }

# The stamps say what is installed; a change of the ranges or of the pins installs again.
$(VENV)/.base: $(PINS) | $(BIN)/activate
	$(PIP) install --editable . --constraint constraints.txt
	@touch $@

$(VENV)/.test: $(PINS) Makefile | $(BIN)/activate
	$(PIP) install --editable '.[$(TEST_EXTRAS)]' --constraint constraints.txt
	@touch $(VENV)/.base $@
