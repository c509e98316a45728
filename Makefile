# layer61: every target works from a fresh clone; `make help` lists them.

PYTHON ?= python3.11
DEVICE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
CONFIG ?= configs/tiny.toml
RUN ?= runs/$(basename $(notdir $(CONFIG)))
ARGS ?=

BIN := .venv/bin
LOCK := requirements/$(DEVICE).lock
STAMP := .venv/.installed-$(DEVICE)
LAYER61 := $(BIN)/layer61
# a file of tests stays in one process, which shares its fixtures; tests/conftest.py says which comes first
TESTS := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# threads that wait in a busy loop slow everything tenfold once anything else wants a core
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup setup-ray demo demo-eagle3 demo-sparse target dump-hidden-states train export-nextn evaluate verify \
	serve bench-serve report test test-fast check check-sglang \
	bench-store bench-dump bench-moe bench-loss bench-train bench-attention bench-checkpoint bench-acceptance kernels-report gpu-rehearsal clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: CONFIG=$(CONFIG) RUN=$(RUN) ARGS='section.key=value ...' DEVICE=$(DEVICE)"

setup: $(STAMP) ## install the locked environment into .venv (DEVICE=cpu or cuda)

# torch comes with its own dependencies, held to the lock's versions: a CPU build where pip has one;
# deepspeed's build needs it there, and everything after it is installed exactly as locked
$(STAMP): $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c $(LOCK) torch==2.13.0 setuptools wheel ninja py-cpuinfo
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -r $(LOCK)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup-ray: $(STAMP)-ray ## add Ray to the environment, for a dump over a cluster

$(STAMP)-ray: $(STAMP) requirements/ray.lock
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements/ray.lock
	@touch $@

demo: setup ## the whole pipeline on a laptop: target, dump, train, export, verify
	$(LAYER61) demo configs/tiny.toml run.dir=runs/demo $(ARGS)

demo-eagle3: setup ## the same with an EAGLE-3 draft from a random start, beside the target of `demo`
	$(LAYER61) demo configs/tiny-eagle3.toml run.dir=runs/demo-eagle3 $(ARGS)

demo-sparse: setup ## documents longer than index_topk: trained under the served mask, and dense beside it
	$(LAYER61) demo configs/tiny-sparse.toml run.dir=runs/demo-sparse $(ARGS)
	$(if $(filter --dry-run,$(ARGS)),,$(BIN)/python -m benchmarks.sparse runs/demo-sparse --seeds 0 --steps 32 --only dense sparse)

target: setup ## build the tiny V3.2-shaped target of CONFIG
	$(LAYER61) target $(CONFIG) $(ARGS)

dump-hidden-states: setup ## stage one: conversations to stored hidden states (CONFIG=, RUN=, ARGS=)
	$(LAYER61) dump $(CONFIG) 'run.dir="$(RUN)"' $(ARGS)

train: setup ## stage two: train layer 61 from the store
	$(LAYER61) train $(CONFIG) 'run.dir="$(RUN)"' $(ARGS)

export-nextn: setup ## write the NextN directory that vLLM and sglang load
	$(LAYER61) export $(CONFIG) 'run.dir="$(RUN)"' $(ARGS)

evaluate: setup ## offline acceptance of a checkpoint (ARGS=evaluate.checkpoint=released)
	$(LAYER61) evaluate $(CONFIG) 'run.dir="$(RUN)"' $(ARGS)

verify: setup ## serve target and draft in vLLM and measure acceptance
	$(LAYER61) verify $(CONFIG) 'run.dir="$(RUN)"' $(ARGS)

serve: setup ## vLLM's OpenAI server with the draft, acceptance shown live
	$(LAYER61) serve $(CONFIG) 'run.dir="$(RUN)"' $(ARGS)

bench-serve: setup ## speed over HTTP with and without drafts, at several concurrencies
	$(LAYER61) bench-serve $(CONFIG) 'run.dir="$(RUN)"' $(ARGS)

report: setup ## one self-contained HTML page about a run
	$(LAYER61) report "$(RUN)"

test: setup setup-ray ## every test; no GPU needed
	$(TESTS) $(ARGS)

test-fast: setup ## the tests that start no engine
	$(TESTS) -n 3 -m "not engine" $(ARGS)

check: setup setup-ray ## lint, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy configs featurestore export pipeline train
	$(TESTS) $(ARGS)

# beside the environment, not in it: sglang wants another torch, and runs with this one as far as the check goes
.venv/sglang: $(STAMP) requirements/sglang.lock
	rm -rf $@
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target $@ -r requirements/sglang.lock

check-sglang: .venv/sglang ## load every layout of an export with sglang's own code, and run its layer beside ours
	PYTHONPATH=.venv/sglang $(BIN)/python -m benchmarks.check_sglang $(ARGS)

bench-store: setup ## store read, write and loader speed (ARGS=--quick)
	$(BIN)/python -m benchmarks.store $(ARGS)

bench-dump: setup ## tokens and bytes a second of stage one
	$(BIN)/python -m benchmarks.dump $(ARGS)

bench-moe: setup ## expert kernels beside every peer that is installed
	$(BIN)/python -m benchmarks.moe $(ARGS)

bench-loss: setup ## the vocabulary loss
	$(BIN)/python -m benchmarks.head_loss $(ARGS)

# alone on the machine: threads wait as torch has them wait by default
bench-train: setup ## tokens a second of a training step
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.train $(ARGS)

bench-attention: setup ## sparse attention by form: time and memory beside the arithmetic
	$(BIN)/python -m benchmarks.attention $(ARGS)

bench-checkpoint: setup ## saving and loading 300 million parameters, beside the disk's own speed
	$(BIN)/python -m benchmarks.checkpoint $(ARGS)

bench-acceptance: setup ## offline acceptance beside vLLM's, on the same text (ARGS="--draft RUN/nextn")
	$(BIN)/python -m benchmarks.acceptance $(ARGS)

kernels-report: setup ## registers, spills and shared memory of each kernel, compiled ahead of time
	$(BIN)/python -m benchmarks.kernels_report $(ARGS)

gpu-rehearsal: ## everything that awaits a GPU, in nine minutes; needs no setup, only torch, triton and pytest
	python3 -m benchmarks.gpu $(ARGS)

clean: ## remove the environment and caches; runs/ is kept
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
