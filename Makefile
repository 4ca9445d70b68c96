# Two commands: `make demo` and `make test`. Each sets up a virtual environment of its own first.
#
#   PYTHON=python3.12          the interpreter to build the environment with
#   PIP_ARGS='--index-url …'   your own pip options, a CPU-only index of torch, say
#   DATA=…  CHECKPOINT=…       the demo's corpus (a folder with train.txt, valid.txt, test.txt) and trained model
#   ARGS=…                     further options of the demo or of pytest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: demo test lint types tutorials docs clean

demo: $(VENV)/.fxquant
	$(BIN)/python -m tutorials.word_language_model --data "$(DATA)" --checkpoint "$(CHECKPOINT)" $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

tutorials: $(VENV)/.docs
	$(BIN)/jupyter nbconvert --to notebook --execute --output-dir build/tutorials --log-level WARN tutorials/*.ipynb

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The package, built in place where there is a C compiler, and what the demo needs.
$(VENV)/.fxquant: pyproject.toml constraints.txt $(wildcard setup.py csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	$(INSTALL) --no-build-isolation -e '.[tutorials]'
	touch $@

$(VENV)/.dev: $(VENV)/.fxquant
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) --no-build-isolation -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build docs/_build .cache *.egg-info
