# The two commands a newcomer needs are `make demo` and `make test`; both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint format gpu install clean

demo: $(VENV)/.installed
	$(PY) -m albef_ds demo

test: $(VENV)/.installed
	$(PY) -m pytest

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Every test and benchmark that a GPU is worth, within ten minutes; its report goes to benchmarks/results/.
gpu: $(VENV)/.installed
	$(PY) -m benchmarks.suite --out benchmarks/results/$(shell date +%Y-%m-%d)

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
