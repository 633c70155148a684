# `make` or `make help` lists what there is. Every target sets up what it needs.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-whole test-faults test-cluster bench lint format learn container \
  lock schemas clean

PYTHON ?= python3
# What `make container` builds: cuda, or cpu.
VARIANT ?= cuda
VENV := .venv
BIN := $(VENV)/bin
LOCKS := $(addprefix containers/,run.lock report.lock workflow.lock dev.lock)
# The stamp's name changes with the contents of what it stands for; file times do not matter.
STAMP := $(VENV)/installed-$(shell cat containers/*.lock pyproject.toml | cksum | cut -d ' ' -f 1)

# Whoever names a build of torch wants it also where another one is installed.
ifdef TORCH
.PHONY: $(STAMP)
endif

# A folder that is not there yet: whatever results are kept, `make learn` trains.
LEARNED := build/learn-$(shell date +%Y%m%d-%H%M%S)
LEARN := snakemake --profile workflow/profiles/quick --config results=$(LEARNED)

# So that `drama` and `snakemake` are found as the README writes them, also in recipes' jobs.
export PATH := $(abspath $(BIN)):$(PATH)

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
	  | while IFS='|' read -r name text; do printf 'make %-12s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## install the locked versions and this project into .venv; TORCH=cpu or cuda

$(STAMP): | $(VENV)/bin/pip
	@rm -f $(VENV)/installed-*
	@TORCH=$(TORCH) sh containers/install.sh $(BIN) $(LOCKS)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Done: $$($(BIN)/python --version), torch $$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1 || true), but Python 3.11 or newer is needed." >&2; \
	  echo "      Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

demo: setup ## train, evaluate and report two real games at toy size, in minutes
	@snakemake --profile workflow/profiles/quick
	@echo
	@cat results/quick/logs/report-everything.log

test: lint ## check style and types, then run the tests but those of whole projects
	@OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadgroup -m "not whole"

test-whole: setup ## whole projects and runs: Snakemake, DVC, every command of the documents
	@OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadgroup -m whole

test-faults: setup ## real runs, killed and starved at 300 moments; damaged files by the thousand; hours
	@DRAMA_FAULT_CASES=300 DRAMA_FUZZ_CASES=10000 OMP_NUM_THREADS=1 \
	  pytest -q -n 2 tests/faults tests/test_doors.py

test-cluster: setup ## real Slurm, Apptainer and ssh, with kills; needs root on Debian 12
	@tests/cluster/install
	@OMP_NUM_THREADS=1 pytest -q tests/cluster

bench: setup ## measure speed and growth; BENCH=part,part PUBLISHED=checkout AGAINST=commit BASELINE=keep
	@python benchmarks/bench.py $(if $(BENCH),--parts '$(BENCH)') \
	  $(if $(PUBLISHED),--published '$(PUBLISHED)') $(if $(AGAINST),--against '$(AGAINST)') \
	  $(if $(filter keep,$(BASELINE)),--dry)

lint: setup ## ruff, mypy, snakefmt, bandit; installed packages against the lock files
	@ruff check .
	@ruff format --check .
	@mypy drama
	@bandit --quiet --configfile pyproject.toml --recursive drama containers benchmarks workflow
	@python containers/audit.py
	@snakefmt --check --compact-diff Snakefile workflow/rules
	@snakemake --lint

format: setup ## let ruff and snakefmt rewrite what `make lint` complains about
	@ruff check --fix .
	@ruff format .
	@snakefmt Snakefile workflow/rules

learn: setup ## show that the agent learns a small pixel game, and not from shuffled rewards; SHORT=1
	@$(LEARN) experiment=config/catch.yaml $(if $(SHORT),seeds=0)
	$(if $(SHORT),,@$(LEARN) experiment=config/catch-shuffled.yaml)
	@echo "Mean returns over 100 greedy episodes:"
	@python benchmarks/learned.py $(LEARNED)
	@echo "The agent on Catch8: at least 0.9 wanted"
	@drama check $(LEARNED)/catch --at-least 0.9
	$(if $(SHORT),,@echo "The same with shuffled rewards: below 0.2 on average wanted")
	$(if $(SHORT),,@drama check $(LEARNED)/catch-shuffled --mean-below 0.2)

container: setup ## build the image for the cluster; VARIANT=cpu, BASE=docker image or folder
	@python containers/build.py --variant $(VARIANT) $(if $(BASE),--base '$(BASE)')

lock: setup ## resolve containers/*.in again and write containers/*.lock
	@sh containers/lock.sh $(BIN)

schemas: setup ## write the JSON schemas of config/ anew, from the models and comments
	@python -m drama.pipeline.schemas

clean: ## remove the virtual environment and caches; results stay
	rm -rf $(VENV) .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find drama tests containers -name __pycache__ -type d -prune -exec rm -rf {} +
