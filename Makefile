# `make demo` and `make test` need nothing but Python 3.11 or later: every target brings .venv up to date first.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
export VENV
# Nothing here needs a model from the network.
export HF_HUB_OFFLINE ?= 1
# Compiled modules are kept: without them, each of the many processes that tests start compiles the project anew.
unexport PYTHONDONTWRITEBYTECODE
# GiB for the KV cache of CPU engines.
export VLLM_CPU_KVCACHE_SPACE ?= 1
# Of the load tests: the users who ask at once, the seconds of a turn, the turns; of the soak: its length and requests per
# second. ARGS goes to each; `python -m loadtests.compare --help` and `python -m loadtests.soak --help` list what it may be.
USERS ?= 2
SECONDS_EACH ?= 8
ROUNDS ?= 3
MINUTES ?= 10
RATE ?= 3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo train-demo test verify lint style types format docs loadtest soak observe dist clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv: vLLM for this machine's CPU or GPU, the project, the tools
	@scripts/setup.sh

demo: ## ask about one picture without and with pruning, and compare
	@TOOLS=none scripts/setup.sh
	@mkdir -p build
	@$(BIN)/vtprune demo --out build/demo.png

HOURS ?= 3
train-demo: setup ## train the demo model, or go on with it (HOURS=3 on two cores)
	$(BIN)/python -m training --hours $(HOURS) $(TRAIN_OPTIONS)

lint: style types ## ruff and mypy

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	@mkdir -p build/packages
	@for name in checkpoints evaluation server; do ln -sfn ../../$$name build/packages/vllm_vtprune_$$name; done
	$(BIN)/mypy

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: style ## lint, and the tests (a fixed sample of every large grid) beside mypy
	@mkdir -p build
	@$(MAKE) --no-print-directory types >build/types.log 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -q --numprocesses 3 --dist loadgroup --no-loadscope-reorder --durations 40; tests=$$?; \
	wait $$types; types=$$?; cat build/types.log; exit $$((tests + types))

verify: setup ## the tests with the whole grids; writes docs/verification.json
	$(BIN)/python scripts/verify.py

build/docs/bin/mkdocs: pyproject.toml
	python3 -m venv build/docs
	build/docs/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	build/docs/bin/python -m pip install --quiet --disable-pip-version-check --group docs
	@touch $@

docs: build/docs/bin/mkdocs ## build the documentation as a site in build/site
	@NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict

loadtest: setup ## stock vLLM and ours under load, compared; USERS, SECONDS_EACH, ROUNDS, ARGS
	@$(BIN)/python -m loadtests.compare --out build/loadtest --users $(USERS) --seconds $(SECONDS_EACH) \
		--rounds $(ROUNDS) $(ARGS)

soak: setup ## ours at a constant rate for long; MINUTES, RATE, ARGS
	@$(BIN)/python -m loadtests.soak --out build/soak --minutes $(MINUTES) --rate $(RATE) $(ARGS)

observe: MINUTES = 1
observe: USERS = 9
observe: setup ## ours under load, watched by a real Prometheus: dashboard and report as pictures; MINUTES, USERS, ARGS
	@$(BIN)/python -m loadtests.observe --out build/observe --minutes $(MINUTES) --users $(USERS) $(ARGS)

dist: setup ## sdist and wheel for PyPI in dist/, checked; REPOSITORY=https://HOST/OWNER/NAME
	$(BIN)/python scripts/dist.py $(REPOSITORY)

clean: ## remove .venv and everything generated
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
