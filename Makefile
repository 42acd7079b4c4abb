# Python 3.11 or newer and pip are all that is needed. Everything is installed in the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
LATEST = $(VENV)-latest
RESOLVED = $(VENV)-constraints

# torch comes for CUDA by default, with gigabytes that a machine without a GPU has no use for.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep "^GPU")
CPU_WHEELS = https://download.pytorch.org/whl/cpu
# On its own and first, so that no other package is looked for there; pip goes on at once where that cannot be reached.
CPU_TORCH = install --quiet --no-deps --extra-index-url $(CPU_WHEELS) --retries 0 --timeout 10

# One process a core; whoever is done first takes over from the others.
PYTEST = -m pytest -n auto --dist worksteal

.PHONY: demo test test-all check test-latest constraints

demo: $(VENV)/installed
	$(VENV)/bin/mitune demo --run $(RUN)

# What every change should pass
test: $(VENV)/installed-dev
	$(VENV)/bin/python $(PYTEST) -m "not slow"

# The slow ones as well, as CI runs them
test-all: $(VENV)/installed-dev
	$(VENV)/bin/python $(PYTEST)

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# pip reads these wherever it installs, also what builds the package.
$(VENV)/installed $(VENV)/installed-dev: export PIP_CONSTRAINT = constraints.txt
$(VENV)/installed $(VENV)/installed-dev: export PIP_BUILD_CONSTRAINT = constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(GPU),,$(VENV)/bin/pip $(CPU_TORCH) torch)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@

# The newest versions within the ranges of pyproject.toml, in an environment of their own
test-latest:
	$(PYTHON) -m venv --clear $(LATEST)
	$(if $(GPU),,$(LATEST)/bin/pip $(CPU_TORCH) torch)
	$(LATEST)/bin/pip install --quiet --editable ".[dev]"
	@echo "Other versions than in constraints.txt:"
	@$(LATEST)/bin/pip freeze --exclude-editable | sed 's/+.*//' | awk -F== \
		'NR == FNR {tested[$$1] = $$2; next} tested[$$1] != $$2 {print "  " $$1, tested[$$1] " -> " $$2}' constraints.txt -
	$(LATEST)/bin/python $(PYTEST) -m "not slow"

# torch stays as it is, since the figures in docs/ were made with it; `make constraints TORCH=torch` takes the newest.
TORCH = $(shell grep '^torch==' constraints.txt)
constraints:
	$(PYTHON) -m venv --clear $(RESOLVED)
	$(if $(GPU),,$(RESOLVED)/bin/pip $(CPU_TORCH) "$(TORCH)")
	$(RESOLVED)/bin/pip install --quiet "$(TORCH)" --editable ".[dev]" hatchling editables
	echo "# Versions that are known to pass together on Python 3.11, and to install on 3.12. Written by \`make constraints\`." > constraints.txt
	$(RESOLVED)/bin/pip freeze --all --exclude-editable | sed '/^pip==/d; s/+.*//' >> constraints.txt
	rm -r $(RESOLVED)
