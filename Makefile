# Every target does its own set-up in a virtual environment; nothing else has to be installed before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench clean

demo: $(VENV)/package
	$(BIN)/embax train examples/data/shakespeare.txt.xz -o build/shakespeare.safetensors
	$(BIN)/embax neighbors build/shakespeare.safetensors king love sword rome -k 10

test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/dev
	$(BIN)/python benchmarks/lookup.py

clean:
	rm -rf build dist .venv .venv-*

$(VENV)/package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	mkdir -p build
	touch $@

$(VENV)/dev: $(VENV)/package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@
