# One verb per need; CI calls the same verbs. Each makes .venv if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2 # processes that share the tests

.PHONY: demo test test-slow dev types lint floors golden bench bench-gpu docs wheel clean

demo: $(VENV)/.bench
	$(BIN)/python examples/sentence_embeddings.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests/interpreted

test-slow: $(VENV)/.dev
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -x -m slow tests/interpreted
	$(BIN)/python -m pytest -n $(WORKERS) -x -m slow --ignore tests/test_examples.py
	$(BIN)/python -m pytest -x -m slow tests/test_examples.py # they are timed: alone

dev: $(VENV)/.dev

types: $(VENV)/.dev
	mkdir -p build/types && ln -sfn "$(CURDIR)" build/types/torchlathe
	MYPYPATH=build/types $(BIN)/mypy -p torchlathe.targets -p torchlathe.passes -p torchlathe.codegen -p torchlathe.optimizer

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

floors: $(VENV)/.dev
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_floors.py

golden: $(VENV)/.dev
	$(BIN)/python -m pytest tests/passes --update-golden

bench: $(VENV)/.bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[peers]"
	$(BIN)/python bench/rows.py
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/zoo_speed.py
	$(BIN)/python bench/peers.py

bench-gpu:
	$(PYTHON) bench/gpu.py

docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/sphinx-build -W -q docs docs/_build

wheel: $(VENV)/.dev
	bash .ci/wheel $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.bench

clean:
	rm -rf $(VENV) build dist *.egg-info
