# The two commands a newcomer needs are `make demo` and `make test`; both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo downstream test fuzz lint format gpu install clean

demo: $(VENV)/.installed
	$(PY) -m albef_ds demo

# Every fine-tuning task on Shapes World, from the demo's weights and from scratch.
downstream: $(VENV)/.installed
	test -f runs/demo/albef.pth || $(PY) -m albef_ds demo
	$(PY) -m albef_ds downstream

test: $(VENV)/.installed
	$(PY) -m pytest

# Faults in real processes, the slow tests included: about half an hour.
test-reliability: $(VENV)/.installed
	$(PY) -m pytest tests/reliability -m ""

# The readers of strangers' files, ten minutes each: tests/fuzz/README.md.
fuzz: $(VENV)/.installed
	$(PY) -m pip install -q -c constraints.txt -e '.[fuzz]'
	for target in annotations shards checkpoints configuration; do \
	  $(PY) -W ignore -m tests.fuzz $$target --minutes $(or $(MINUTES),10) || exit 1; done

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
