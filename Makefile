# Two commands: `make demo` runs the main job, `make test` passes the tests. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow lint docs clean

$(VENV)/bin/jaxalign: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@

demo: $(VENV)/bin/jaxalign
	$(VENV)/bin/jaxalign train experiments/quickstart.py

test: $(VENV)/bin/jaxalign
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "not network and not accelerator and not slow" --durations 20 --durations-min 1

test-slow: $(VENV)/bin/jaxalign
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "slow and not network and not accelerator"

lint: $(VENV)/bin/jaxalign
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports

$(VENV)/bin/mkdocs: setup.py $(VENV)/bin/jaxalign
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

docs: $(VENV)/bin/mkdocs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build site *.egg-info
