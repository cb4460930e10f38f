# Every target sets up what it needs in .venv. With ENV=current it runs in the environment of the
# calling shell instead and installs nothing (a GPU machine has its own torch).
#
#   make demo    fine-tune the example model and print its table    MODEL=folder of its weights
#   make test    lint, types, the compile gate, all tests
#   make gate    the compile gate alone
#   make test-gpu  the tests on this machine's GPU, kernels compiled, not interpreted

PYTHON ?= python3
ENV ?= .venv
MODEL ?=

ifeq ($(ENV),current)
READY :=
RUN := PYTHONPATH=. $(PYTHON)
else
READY := $(ENV)/ready
RUN := $(ENV)/bin/python
endif

.PHONY: demo test lint gate test-gpu

demo: $(READY)
	$(RUN) examples/code_search.py $(if $(MODEL),--model $(MODEL))

test: lint gate
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

gate: $(READY)
	$(RUN) tests/gate.py

test-gpu: $(READY)
	FUSED_LOWRANK_TEST_DEVICE=cuda $(RUN) -m pytest

.venv/ready: requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
