# Two commands: `make demo` and `make test`. Each sets up a virtual environment of its own first.
#
#   PYTHON=python3.12          the interpreter to build the environment with
#   PIP_ARGS='--index-url …'   your own pip options, a CPU-only index of torch, say
#   DATA=…  CHECKPOINT=…       the demo's corpus (a folder with train.txt, valid.txt, test.txt) and trained model
#   ARGS=…                     further options of the demo or of pytest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Of torch's thousands of files an import reads some; Python compiles those then, in less time than pip would take for all.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# Tests run in a process for each core; more than four wait for memory and for each other.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

C_FILES := $(foreach depth,* */* */*/* */*/*/*,$(wildcard csrc/$(depth).c csrc/$(depth).cpp csrc/$(depth).h))

.PHONY: demo test lint types tutorials docs wheel triton clean

demo: $(VENV)/.fxquant
	$(BIN)/python -m tutorials.word_language_model --data "$(DATA)" --checkpoint "$(CHECKPOINT)" $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES) tests/native/harness.c benchmarks/limits.c tests/native/pool_choices.c examples/cpp/main.cpp

types: $(VENV)/.dev
	$(BIN)/mypy

tutorials: $(VENV)/.docs
	$(BIN)/jupyter nbconvert --to notebook --execute --output-dir build/tutorials --log-level WARN tutorials/*.ipynb

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Triton (1 GB), unless torch brought its own: `make test` then runs the kernels for GPUs too, by Triton's interpreter. Its
# version is not in constraints.txt, because torch's builds with CUDA ask for others.
triton: $(VENV)/.dev
	$(BIN)/python -c 'import triton' 2> /dev/null || $(INSTALL) 'fxquant[gpu]' triton==3.9.0

# A source distribution and a wheel for this machine in dist/, as a package index would take them.
wheel: $(VENV)/.release
	rm -rf dist
	LDFLAGS=-Wl,-s $(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# The package, built in place where there is a C compiler, and what the demo needs.
$(VENV)/.fxquant: pyproject.toml constraints.txt setup.py $(C_FILES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	$(INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

# By its name: the package as it lies here is installed already, and need not be compiled again.
$(VENV)/.dev: $(VENV)/.fxquant
	$(INSTALL) 'fxquant[dev,transformers,onnx]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) 'fxquant[docs,tutorials,onnx]'
	touch $@

$(VENV)/.release: $(VENV)/.fxquant
	$(INSTALL) 'fxquant[release]'
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build .cache *.egg-info
