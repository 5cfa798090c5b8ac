# `make apply` brings the stack up on this machine; `make test` runs every check. `make help` lists the rest.
PYTHON ?= python3
INVENTORY ?= inventories/local
ARGS ?=

BIN := .venv/bin
LINK := .collections/ansible_collections/sottovoce/stack
PLAYBOOK := $(BIN)/ansible-playbook -i $(INVENTORY)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup apply check plan status health doctor verify destroy test lint unit sanity e2e bench lock build clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready $(LINK) ## Make .venv with everything a checkout needs

# The marker is newer than the locks it was made from, so a changed lock installs again.
.venv/ready: requirements-dev.txt gateway/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed; set PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/uv pip install --quiet --python .venv --no-deps --offline -e gateway
	@# molecule and ansible-lint look for ansible's commands on PATH; called as .venv/bin/molecule they find them too.
	@$(BIN)/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/path.pth", "w").write(\
	  "import os, sys; os.environ[\"PATH\"] = os.pathsep.join([sys.prefix + \"/bin\", os.environ.get(\"PATH\", \"\")])\n")'
	@touch $@

$(LINK):
	@mkdir -p $(dir $@)
	@ln -sfn ../../.. $@

apply: setup ## Make the machine as infra.yml says, and say a sentence to it
	$(PLAYBOOK) playbooks/apply.yml $(ARGS)

check: setup ## Show what apply would change
	$(PLAYBOOK) playbooks/check.yml --check --diff $(ARGS)

plan: setup ## Show what lives on each card, and whether it fits (needs neither Incus nor a card)
	$(PLAYBOOK) playbooks/plan.yml $(ARGS)

status: setup ## Show machines, services, models and free memory
	$(PLAYBOOK) playbooks/status.yml $(ARGS)

doctor: setup ## Show what keeps this host's GPU from its machines, and what mends it
	$(PLAYBOOK) playbooks/doctor.yml $(ARGS)

health: setup ## Show who uses the VRAM of each machine; fails where it is not as it should be
	$(PLAYBOOK) playbooks/health.yml $(ARGS)

verify: setup ## Ask every service for its health and say the sentence again
	$(PLAYBOOK) playbooks/verify.yml $(ARGS)

destroy: setup ## Remove what apply made (asks first; ARGS='-e confirm=yes' answers)
	$(PLAYBOOK) playbooks/destroy.yml $(ARGS)

test: setup lint unit sanity e2e ## Run every check

lint: setup ## Run ruff, mypy, yamllint and ansible-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy -p ansible_collections.sottovoce.stack.plugins
	$(BIN)/yamllint .
	$(BIN)/ansible-lint --offline

unit: setup ## Run the tests that need no daemon
	$(BIN)/pytest -q --numprocesses 2 --dist loadfile -m "not incus and not speaches" gateway/tests tests/unit

sanity: setup ## Run ansible-test sanity on a copy laid out as a collection
	tests/sanity.sh

e2e: setup ## Run molecule and the end-to-end tests in an Incus daemon of their own
	tests/e2e.sh

bench: setup ## Measure and print ratios (nothing here passes or fails)
	$(BIN)/python bench/run.py $(ARGS)

lock: ## Pin requirements-dev.in again
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url \
	  --no-annotate --python-version 3.11 --output-file requirements-dev.txt requirements-dev.in

build: setup ## Build the collection's tarball under build/
	$(BIN)/ansible-galaxy collection build --force --output-path build

clean: ## Remove what setup and build made
	rm -rf .venv .collections build artifacts
