# Everything runs in .venv, which the first target that needs it creates. `make help` lists the targets.

VENV ?= .venv
RUN = $(VENV)/bin/python
STAMP = $(VENV)/installed

# The first Python in range that really runs and can make a virtual environment: a name on the PATH may be a
# version manager's shim that only prints an error, and some systems split `venv` off into another package.
PYTHON ?= $(shell for name in python3.12 python3.11 python3.10 python3; do \
	if $$name -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
		>/dev/null 2>&1; then echo $$name; break; fi; done)

# An environment whose Python has gone, or that lost packages, counts as not there.
HEALTHY = from importlib.util import find_spec; exit(not all(map(find_spec, ("fairseq", "pytest", "torch"))))
$(shell test ! -e $(STAMP) || $(RUN) -c '$(HEALTHY)' >/dev/null 2>&1 || rm -f $(STAMP))

.DEFAULT_GOAL := help
.PHONY: help test quick demo docs figures bench lint format constraints clean

DEMO = 'a fast happy piano melody' 'a slow low organ in minor, with drums'
MODEL ?= small

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

# No stamp means no environment or a half-made one, which is made anew. The stamp goes first and comes back
# last, so that an interrupted update counts as half-made too.
$(STAMP): setup.py constraints.txt compat/fairseq/setup.py $(wildcard compat/fairseq/fairseq/*.py)
	@test -n "$(PYTHON)" || { echo "no Python 3.10-3.12 with venv found; name one: make PYTHON=..." >&2; exit 1; }
	@if test -e $@; then rm $@; else echo "$(PYTHON) -m venv $(VENV)" && "$(PYTHON)" -m venv --clear $(VENV); fi
	$(RUN) -m pip install -c constraints.txt -e '.[test]'
	@touch $@

test: $(STAMP) ## the whole suite, on two cores; ARGS='-k name' is handed to pytest
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

quick: $(STAMP) ## the suite without its slow tests
	$(RUN) -m pytest -n 2 --dist worksteal -m 'not slow' $(ARGS)

demo: $(STAMP) ## make music for two prompts, and a page to hear and see it: out/demo/index.html
	$(RUN) -m musiclm_pytorch.cli generate $(or $(PROMPTS),$(DEMO)) --model $(MODEL) --num-samples 4 --seconds 5 -o out/demo --overwrite $(ARGS)

docs: $(STAMP) ## the site, with the reference of every public name: build/site/index.html
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(RUN) -m mkdocs build --strict --quiet

figures: $(STAMP) ## put the tables of README and pages right after a change of docs/figures
	$(RUN) docs/tables.py

bench: $(STAMP) ## MuLaN's speed and memory
	$(RUN) benchmarks/mulan.py $(ARGS)

lint: $(STAMP) ## what CI checks of style and imports
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports --no-cache

format: $(STAMP) ## put the style right
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# One file for all supported Pythons: uv resolves for the range and marks what differs. The stand-in is left
# out, since it has no version to pin: it comes with the checkout.
constraints: $(STAMP) ## resolve the newest versions into constraints.txt
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras \
		--no-emit-package fairseq --no-annotate --no-header --output-file $(VENV)/constraints.txt setup.py
	{ sed -n '/^#/!q; p' constraints.txt; grep -v '^ *#' $(VENV)/constraints.txt; } > $(VENV)/constraints.new
	mv $(VENV)/constraints.new constraints.txt

clean: ## remove the environment and what tools leave behind
	rm -rf $(VENV) build dist *.egg-info compat/fairseq/build compat/fairseq/*.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
