# Needs Python 3.11+, make and git; everything else is installed below .venv and .cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OPENAPI := .cache/openapi/.installed
AGENT ?= kilo
SCENARIO ?= review

.PHONY: up down demo test test-unit docs suite-crash suite-flow suite-tenancy suite-hostile bench check deps format lock doctor clean

up: $(STAMP)
	@exec $(BIN)/kilo-pipelines up $(if $(filter-out file,$(origin AGENT)),--agent $(AGENT))

down: $(STAMP)
	@$(BIN)/kilo-pipelines down

demo: $(STAMP)
	@exec $(BIN)/kilo-pipelines demo --agent $(AGENT) --scenario $(SCENARIO) $(if $(REPO),--repo $(REPO) --base $(or $(BASE),HEAD~1) --head $(or $(HEAD),HEAD))

doctor: $(STAMP)
	@$(BIN)/kilo-pipelines doctor

deps: $(STAMP) $(OPENAPI)

$(STAMP): requirements.lock pyproject.toml kilo_pipelines/cloud_agent/install.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	$(BIN)/python -m kilo_pipelines.cloud_agent.install
	@touch $@

# GitHub's published description of its API, for tests only.
$(OPENAPI): tests/contracts/package.json | $(STAMP)
	@mkdir -p .cache/openapi && cp tests/contracts/package.json .cache/openapi/
	$(BIN)/python -m kilo_pipelines.cloud_agent.install npm .cache/openapi install --silent --ignore-scripts --no-audit --no-fund --no-package-lock
	@touch $@

test: deps
	$(BIN)/python -m pytest tests/unit -q -n 2
	$(BIN)/python -m pytest tests --ignore tests/unit -q -n 2 --dist loadfile --no-loadscope-reorder

test-unit: deps
	$(BIN)/python -m pytest tests/unit -q -n 2

# The suites in full; each ends with one JSON line of counts.
suite-crash suite-flow suite-tenancy suite-hostile: suite-%: deps
	$(BIN)/python -m pytest tests/$* -q -n 2 --dist loadfile --full --suite $* --timeout 3600

# NAME=... runs one benchmark; results go to benchmarks/results.json.
bench: deps
	$(BIN)/python -m benchmarks $(NAME)

# The tables of the documentation that come from the code.
docs: deps
	$(BIN)/python -m kilo_pipelines.cli.reference

check: deps
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	# Elsewhere: the checkout's dagster.yaml is the platform's and wants its database.
	cd .cache && DAGSTER_HOME= ../$(BIN)/dagster definitions validate -m kilo_pipelines.definitions

format: deps
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Versions and hashes only: the lock names no address.
lock: deps
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-emit-index-url --no-header --no-annotate --generate-hashes --extra dev -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .cache
