# Every target sets up what it needs in .venv. With ENV=current it runs in the environment of the
# calling shell instead and installs nothing (a GPU machine has its own torch).
#
#   make demo    fine-tune the example model and print its table    MODEL=folder of its weights
#   make family  every method, every init of LoRA-XS and LoRA-Mini, and choices of what LoRA-Mini
#                freezes, on that task, three seeds; half an hour, goes on where it was
#                stopped                                            MODEL= as above
#   make demo-qlora  that task over an nf4 base and over a 16-bit one, three seeds; goes on where it
#                was stopped                                        MODEL= as above
#   make train-many   train 240 adapters of that model in one run   MODEL= as above
#   make test    lint, types, the compile gate for what has changed, all tests
#   make test-peft  PEFT's own tests, from its source distribution, with our methods as rows of them
#   make sweep   every small language model of transformers, adapted in both ways; long
#   make gate    the whole compile gate, of every row of its table
#   make bench   every provider over the CPU cases, a small block, mixed batches, and the report of
#                all results
#   make test-gpu   the tests on this machine's GPU, kernels compiled, not interpreted
#   make bench-gpu  those tests, the core cases with every provider, one block, mixed batches, the
#                   report; in under nine minutes, and what a cut-off leaves undone is done by the
#                   next call

PYTHON ?= python3
ENV ?= .venv
MODEL ?=

ifeq ($(ENV),current)
READY :=
RUN := env PYTHONPATH=. $(PYTHON)
else
READY := $(ENV)/ready
RUN := $(ENV)/bin/python
endif

# For a rehearsal of bench-gpu without a GPU, the device timer replaced and every size divided by 64:
#   BENCH_TIMER=host BENCH_SHRINK=64 OMP_NUM_THREADS=1 make bench-gpu DEVICE=cpu \
#   RESULTS=some/folder README=none
RESULTS ?= bench/results
README ?= README.md
DEVICE ?= cuda
TEST_MINUTES ?= 3
# How many processes compile at a time on a GPU's machine, each with a share of the GPU's memory.
PROCESSES ?= 16
CASE_MINUTES ?= 3
BANK_MINUTES ?= 1
# Where test-peft puts PEFT's source distribution.
PEFT_FOLDER ?= $(or $(TMPDIR),/tmp)/fused-lowrank-peft

.PHONY: demo demo-qlora family train-many test test-peft sweep lint gate gate-changed bench bench-smoke \
	test-gpu bench-gpu

demo: $(READY)
	$(RUN) examples/code_search.py $(if $(MODEL),--model $(MODEL))

demo-qlora: $(READY)
	$(RUN) examples/qlora.py $(if $(MODEL),--model $(MODEL))

family: $(READY)
	$(RUN) examples/family.py $(if $(MODEL),--model $(MODEL))

train-many: $(READY)
	$(RUN) examples/train_many.py $(if $(MODEL),--model $(MODEL))

# Most of what comes before the tests uses one core: two targets at a time, the output of each whole.
test: $(READY)
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint gate-changed bench-smoke
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

sweep: $(READY)
	OMP_NUM_THREADS=1 $(RUN) tests/support/sweep.py

test-peft: $(READY)
ifneq ($(ENV),current)
	$(RUN) -m pip install --quiet -r requirements-peft.txt
endif
	OMP_NUM_THREADS=1 $(RUN) tests/support/peft_suite.py $(PEFT_FOLDER) -n 2

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

gate: $(READY)
	$(RUN) tests/gate/gate.py

gate-changed: $(READY)
	$(RUN) tests/gate/gate.py --changed

bench: $(READY)
	OMP_NUM_THREADS=1 $(RUN) bench/run.py --set cpu --device cpu --out $(RESULTS)
	OMP_NUM_THREADS=1 $(RUN) bench/block.py --device cpu --out $(RESULTS)
	OMP_NUM_THREADS=1 $(RUN) bench/bank.py --set cpu --device cpu --out $(RESULTS)
	$(RUN) bench/report.py --results $(RESULTS) --readme $(README)

bench-smoke: $(READY)
	$(RUN) bench/report.py --check
	OMP_NUM_THREADS=1 $(RUN) -m pytest bench -q

test-gpu: $(READY)
	FUSED_LOWRANK_TEST_DEVICE=cuda $(RUN) -m pytest -n $(PROCESSES) --dist worksteal

# A red test or a time-out shows in the output and must not keep the measuring from being done.
bench-gpu: $(READY)
	-FUSED_LOWRANK_TEST_DEVICE=$(DEVICE) timeout $(TEST_MINUTES)m $(RUN) -m pytest tests -n $(PROCESSES) --dist worksteal -q
	-$(RUN) bench/run.py --set core --device $(DEVICE) --out $(RESULTS) --resume --minutes $(CASE_MINUTES) \
		--warm $(PROCESSES)
	-$(RUN) bench/block.py --device $(DEVICE) --out $(RESULTS)
	-$(RUN) bench/bank.py --set gpu --device $(DEVICE) --out $(RESULTS) --resume --minutes $(BANK_MINUTES)
	-$(RUN) bench/bank_stack.py --device $(DEVICE) --out $(RESULTS)
	$(RUN) bench/report.py --results $(RESULTS) --readme $(README)

# All cores compile what pip would compile on one, and not what is seldom imported. What has another
# Python's syntax is left out, as pip leaves it out.
.venv/ready: requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --no-compile -r requirements-dev.txt
	-.venv/bin/python -m compileall -qq -j 0 -x '/(tests|testing|pip)/|/transformers/models/' .venv/lib
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
