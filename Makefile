# The two commands: `make search` and `make test`. Both set everything up first; the second time that takes no time.
PYTHON ?= python3
VENV ?= .venv

.PHONY: setup test search

setup:
	@$(PYTHON) scripts/install.py --venv $(VENV)

test: setup
	$(VENV)/bin/python -m pytest

search: setup
	$(VENV)/bin/cse-search run --preset quickstart
