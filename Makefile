# From a fresh clone, with Python 3.10-3.13, pip and make: `make demo`, `make test`.
#   PYTHON=python3.12   the interpreter that .venv is built from
#   ARGS="..."          passed on to the demo or to pytest
#   JOBS=1              the number of processes that run tests; left out, one for each core
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= auto
CONSTRAINTS ?= constraints.txt

PY := $(VENV)/bin/python
# The environment is rebuilt when the Python, the requirements or their pins change, not when a file is touched.
KEY := $(shell $(PYTHON) -c 'import hashlib, sys; v = "%d.%d" % sys.version_info[:2]; \
	print(v + "-" + hashlib.sha256(b"".join(open(f, "rb").read() for f in ("pyproject.toml", "$(CONSTRAINTS)"))).hexdigest()[:12])' 2>/dev/null)
CHECK_PYTHON := $(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	"adaptive-bilevel needs Python 3.10-3.13 and $(PYTHON) is %d.%d: name another one, as in  make test PYTHON=python3.12" \
	% sys.version_info[:2])'
PIP := pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed-$(KEY)
DOCS := $(VENV)/.docs-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help env demo bench test lint format types pytest docs pages test-jax test-policies test-oldest test-betty-matrix test-hosts clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

env: $(INSTALLED) ## build .venv (every other command does it when needed)

$(INSTALLED):
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m $(PIP) hatchling editables
	$(PY) -m $(PIP) --no-build-isolation --editable '.[dev]'
	$(PY) -m $(PIP) --no-deps --ignore-requires-python betty-ml
	@touch $@

demo: $(INSTALLED) ## learn a representation of handwritten digits, with no step size given
	$(PY) examples/hyper_representation.py $(ARGS)

bench: $(INSTALLED) ## tasks x methods x seeds; ARGS="--quick", ARGS="--task hyper-cleaning --data DIR"
	OMP_NUM_THREADS=1 $(PY) examples/benchmarks/suite.py $(ARGS)

test: lint $(DOCS) ## all gates: lint, types, the site, doctests, tests
	$(MAKE) --jobs 2 types docs  # after $(DOCS), so that no package is installed while mypy reads them
	$(MAKE) pytest

lint: $(INSTALLED) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED) ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(INSTALLED) ## mypy: strict on the package, looser on tests
	$(PY) -m mypy

pytest: $(INSTALLED) ## doctests and tests only; ARGS="-k bisls"
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

$(DOCS): $(INSTALLED)
	$(PY) -m $(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

docs: $(DOCS) ## the site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

pages: $(INSTALLED) ## run the programs of the site's example pages, and write what they print into the pages
	OMP_NUM_THREADS=1 $(PY) docs/_site/pages.py docs/reading.md docs/examples/*.md

test-jax: $(INSTALLED) ## only the tests on JAX scalars (make test runs them too)
	$(PY) -m pytest -k jax $(ARGS)

# The policies promise to need no framework: here there is no torch, so this also is the quick check of another Python.
BARE := .venv-policies-$(firstword $(subst -, ,$(KEY)))

test-policies: ## the policies and their tests where torch is not installed; PYTHON=python3.13
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(BARE)
	$(BARE)/bin/python -m $(PIP) array-api-compat numpy jax pytest hypothesis hatchling editables
	$(BARE)/bin/python -m $(PIP) --no-build-isolation --no-deps --editable .
	$(BARE)/bin/python -m pytest adaptive_bilevel/policies tests/policies $(ARGS)

# The floor of pyproject.toml. That torch chooses its own triton.
OLDEST_TORCH := 2.9.1

test-oldest: ## doctests and tests on the oldest torch, in an environment of its own; ARGS="-k bisls"
	@mkdir -p build
	sed -e 's/^torch==.*/torch==$(OLDEST_TORCH)/' -e '/^triton==/d' constraints.txt > build/oldest.txt
	$(MAKE) pytest VENV=.venv-oldest CONSTRAINTS=build/oldest.txt

# Betty 0.1.1 beside the environment; only a pip before 24.1 reads its metadata. Another Python: PYTHON=python3.10.
OLD_BETTY := $(VENV)/betty-0.1.1-$(KEY)

$(OLD_BETTY): $(INSTALLED)
	$(PY) -m pip install --quiet --disable-pip-version-check --target $(VENV)/old-pip 'pip<24.1'
	PYTHONPATH=$(VENV)/old-pip $(PY) -W ignore -m pip install --quiet --disable-pip-version-check \
		--no-deps --ignore-requires-python --target $@ betty-ml==0.1.1

test-betty-matrix: $(INSTALLED) $(OLD_BETTY) ## the integration with Betty on both of its releases; PYTHON=python3.10
	$(PY) -m pytest tests/betty $(ARGS)
	PYTHONPATH=$(OLD_BETTY) $(PY) -m pytest tests/betty $(ARGS)

# The trainers and hosts that need no integration, beside what .venv has; make test runs these tests too from then on.
HOSTS := accelerate==1.15.0 pytorch-lightning==2.6.6 transformers==5.24.0 benchopt==1.10.0 higher==0.2.1

test-hosts: $(INSTALLED) ## Accelerate, Lightning, transformers, benchopt, higher and BOAT themselves: installs them into .venv
	$(PY) -m $(PIP) $(HOSTS)
	$(PY) -m $(PIP) --no-deps boat-torch==1.1.1 # it asks for an old numpy
	$(PY) -m pytest tests/hosts tests/examples/test_quickstart.py $(ARGS)

clean: ## remove what these commands made
	rm -rf $(VENV) .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
