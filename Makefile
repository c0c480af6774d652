# The two commands a newcomer needs are `make demo` and `make test`; both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Whose Python tests/rehearsal calls.
FLASH_ATTN := 2.8.3

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

# Every test and benchmark that a GPU is worth, in the order of their worth, as far as MINUTES reach; stopped anywhere it
# leaves what was measured, in benchmarks/results/.
gpu: $(VENV)/.installed
	$(PY) -m benchmarks.suite --minutes $(or $(MINUTES),50) --out benchmarks/results/$(shell date +%Y-%m-%d)

install: $(VENV)/.installed

# flash-attn's Python without its kernels, for tests/rehearsal, is kept apart, so that nobody takes it for one that works.
$(VENV)/.installed: setup.py constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	$(PY) -m pip install -q -c constraints.txt packaging psutil ninja setuptools wheel
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(PY) -m pip install -q --no-deps \
	  --no-build-isolation --upgrade --target $(VENV)/flash-attn flash-attn==$(FLASH_ATTN)
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
