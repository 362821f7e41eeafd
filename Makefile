# make help
PYTHON ?= python3
TORCH ?= torch==2.14.1
VENV ?= .venv
MOE_EXT_CUDA ?= auto
export MOE_EXT_CUDA
# What the stamp of an install depends on beside the sources: another choice means another build.
BUILD_CHOICE := cuda-$(MOE_EXT_CUDA)
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake CMakeLists.txt setup.py pyproject.toml -type f 2>/dev/null)
CXX_SOURCES = $(shell find csrc tests/emulation -name '*.h' -o -name '*.cpp' -o -name '*.cu')
PYTHON_SOURCES := python bench tests docs setup.py cmake/build_checks.py

.DEFAULT_GOAL := help
.PHONY: help venv install test bench lint format docs wheel clean

help:  ## this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.stamp-venv: requirements/build.txt requirements/dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' -r requirements/dev.txt
	touch $@

venv: $(BIN)/.stamp-venv  ## .venv with torch and every tool

$(BIN)/.stamp-$(BUILD_CHOICE): $(BIN)/.stamp-venv $(SOURCES)
	rm -f $(BIN)/.stamp-cuda-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

install: $(BIN)/.stamp-$(BUILD_CHOICE)  ## build and install into .venv, editable

test: install  ## set everything up and run the tests
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

bench: install  ## set everything up and run the microbenchmark: on the GPU where there is one, else on the CPU
	$(BIN)/python -m bench $(BENCH_ARGS)

lint: venv  ## ruff, clang-format, mypy
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: venv  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CXX_SOURCES)

docs: install  ## the documentation, docs/_build/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

wheel: venv  ## dist/*.whl for the Python of .venv; MOE_EXT_CUDA=1 needs nvcc, not a GPU
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## what a build leaves, not .venv
	rm -rf build dist docs/_build *.egg-info python/*.egg-info python/moe_ext/*.so
