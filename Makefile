# Every target shares one virtual environment, made on first use and again when its inputs change.
# Only Python is needed beforehand; `make test` fetches the servers that it starts.

.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Most tests wait for disks and for other processes. Each worker has servers of its own.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
FAST := not postgres and not mariadb and not slow and not fault and not acceptance

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Progress shows as it happens, in a log too.
export PYTHONUNBUFFERED := 1

.PHONY: help demo test test-fast check bench chaos constraints servers clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(INSTALLED) ## the refund agent, with kills and approvals, in under a minute
	@$(PYTHON) -m examples.refunds.demo

test: $(INSTALLED) servers ## every test, with the real servers that they need
	@$(PYTHON) -m pytest $(PARALLEL)

test-fast: $(INSTALLED) ## the tests that need no server, in under a minute
	@$(PYTHON) -m pytest -m "$(FAST)"

check: $(INSTALLED) ## formatting, lint, types and layers
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

bench: $(INSTALLED) servers ## agentflow beside other checkpointers, in one run
	@$(PYTHON) -m benchmarks

chaos: $(INSTALLED) servers ## random faults for a long time; writes docs/faults.md
	@$(PYTHON) -m tests.fault.chaos

constraints: | $(PYTHON) ## compile constraints.txt again; UPGRADE=1 takes the newest versions
	@$(PYTHON) -m pip install --quiet -c constraints.txt pip-tools
	@$(VENV)/bin/pip-compile --quiet --all-extras --strip-extras $(if $(UPGRADE),--upgrade) \
	  --no-header --annotation-style=line --no-emit-options \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --output-file=constraints.txt pyproject.toml
	@# The project itself is listed by its path on this machine, which is no constraint.
	@{ echo '# Compiled by `make constraints` from pyproject.toml with all extras; not edited by hand.'; \
	   sed -e '/^agentflow @/d' -e 's/agentflow, agentflow (pyproject.toml)/agentflow/' \
	       -e 's/agentflow (pyproject.toml)/agentflow/' -e '/^$$/,$$d' constraints.txt; \
	 } > $(VENV)/constraints.txt && mv $(VENV)/constraints.txt constraints.txt

servers:
	@sh tests/install_servers.sh

clean: ## remove the environment and everything that can be made again
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache \
	  .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(PYTHON)
	@echo 'Installing agentflow into $(VENV) (once; a minute or two) ...'
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip >/dev/null
	@$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	@touch $@

$(PYTHON):
	@for python in python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	    >/dev/null 2>&1; then exec $$python -m venv --clear $(VENV); fi; \
	done; \
	echo 'agentflow needs Python 3.11 or newer with the venv module; none of python3, python3.13,' \
	  'python3.12 and python3.11 is that (on Debian and Ubuntu: apt-get install python3-venv).' >&2; \
	exit 1
