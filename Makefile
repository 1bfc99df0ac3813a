# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets: a `##` comment after a target is its help.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PY := .venv/bin/python
CONFIG ?= configs/quickstart.yaml
# Tests at a time, but for those under Ray Serve.
WORKERS ?= 2
CODE := $(wildcard disagg pools transport tests benchmarks examples scripts)

.PHONY: help setup install serve test test-unit test-component test-engine test-e2e lint format type bench bench-probes \
	prove-serve prove-tiers prove-faults prove-house prove-use check-upstream \
	check-gpu-set lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## create .venv from requirements/cpu.lock and write the tiny model; does nothing when nothing changed
	@scripts/setup.sh

install: setup ## the same as setup

serve: setup ## serve 1 prefill and 1 decode replica on this machine (CONFIG=configs/other.yaml, MODEL=id or directory)
	@.venv/bin/disagg serve $(CONFIG) $(if $(MODEL),--model $(MODEL))

test: test-unit test-component test-engine test-e2e ## all tests that need no GPU

test-unit: setup ## pure code, a minute or two (ARGS="-k name" for some)
	$(PY) -m pytest tests/unit -n $(WORKERS) $(ARGS)

test-component: setup ## with classes of vLLM, torch and LMCache, no engine
	$(PY) -m pytest tests/component -n $(WORKERS) --dist loadfile -m "not gpu" $(ARGS)

test-engine: setup ## real engines and LMCache servers
	$(PY) -m pytest tests/engine -n $(WORKERS) --dist loadfile -m "not gpu" $(ARGS)

test-e2e: setup ## the whole application under Ray Serve
	$(PY) -m pytest tests/e2e -m "not gpu" $(ARGS)

lint: setup ## ruff, format and import rules
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	.venv/bin/lint-imports --no-cache

format: setup ## fix what ruff can fix, and format
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

type: setup ## mypy --strict over the three packages
	$(PY) -m mypy

bench: setup ## measure throughput and latency (ARGS="..." goes to the benchmark)
	$(PY) -m benchmarks $(ARGS)

bench-probes: setup ## measure what health probes cost an idle engine
	$(PY) -m benchmarks.probes $(ARGS)

prove-serve: setup ## show, line by line, that the served application keeps its promises (LINE=n for one)
	$(PY) -m tests.prove.serve $(if $(LINE),--line $(LINE))

prove-tiers: setup ## the same for the KV tiers (LINE=n for one)
	$(PY) -m tests.prove.tiers $(if $(LINE),--line $(LINE))

prove-faults: setup ## the same for failures, drains and tenants (LINE=n for one)
	$(PY) -m tests.prove.faults $(if $(LINE),--line $(LINE))

prove-house: setup ## the same for the rooms, seams and doors of the code (LINE=n for one)
	$(PY) -m tests.prove.house $(if $(LINE),--line $(LINE))

prove-use: setup ## the same for what breaks in use (LINE=n for one)
	$(PY) -m tests.prove.use $(if $(LINE),--line $(LINE))

check-upstream: setup ## what the newest vLLM, Ray, LMCache and NIXL still have of what we borrow (ARGS="--diff vllm==0.33.0")
	$(PY) scripts/check_upstream.py $(ARGS)

check-gpu-set: setup ## whether all that requirements/gpu.lock installs finds its libraries; needs no GPU, fetches 4 GB once
	$(PY) scripts/check_gpu_set.py $(ARGS)

lock: ## resolve requirements/cpu.lock and gpu.lock again, from pyproject.toml
	$(or $(wildcard $(PY)),python3.11) scripts/lock.py

clean: ## remove .venv, .cache and what tools left behind
	rm -rf .venv .cache *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
