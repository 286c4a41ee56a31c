# The two commands: `make search` and `make test`. Both set everything up first; the second time that takes no time.
# `make docs` builds the documentation into site/.
PYTHON ?= python3
VENV ?= .venv

.PHONY: setup lint test search docs

setup:
	@$(PYTHON) scripts/install.py --venv $(VENV)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: setup
	$(VENV)/bin/python -m pytest

search: setup
	$(VENV)/bin/cse-search run --preset quickstart

docs: setup
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "mkdocs-material>=9.5,<10" "mkdocstrings[python]>=0.27"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
