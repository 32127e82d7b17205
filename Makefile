# Two targets do all the set-up: demo and test. Both make .venv and install first where that is not done.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install demo test test-full test-deploy lint format clean

help:            ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

install: $(INSTALLED)  ## create .venv with everything, pinned by constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: install    ## run the demo: digits, five clients, offline
	$(BIN)/fedtalora run

test: install    ## run the test suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-full: install  ## run also the slow, full-size checks
	$(BIN)/python -m pytest -m "full or not full"

test-deploy: install  ## run the real deployments and every fault in docs/DEPLOY.md, printed as the rows of its table
	$(BIN)/python -m pytest -m "full or not full" tests/test_deployment.py tests/test_faults.py tests/test_full_disk.py tests/test_fuzz.py tests/deploy

lint: install    ## ruff, ruff format, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove the environment and caches, keep the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
