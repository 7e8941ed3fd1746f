SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

# The model: tiny is the one in models/tiny, flash is DeepSeek-V4-Flash.
PROFILE := tiny
# Everything is written below $(SCRATCH)/$(PROFILE).
SCRATCH := scratch
# host or docker; empty: host for tiny, docker for flash.
RUNTIME :=
GPUS := 1
DEVICES :=
# Empty: what the profile says (v4forge/stages.py).
SOURCE :=
CORPUS :=
SAMPLES :=
SEQ_LEN :=
SEED := 42
STAGE := calibrate
# What pytest runs besides its options in pyproject.toml.
TESTS := -m "not images and not gpu"

# A name on PATH may be a shim of a version that is not installed: only running it tells.
PYTHON = $(shell for python in python3.12 python3.11 python3; do \
	if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; \
	then echo $$python; break; fi; done)

ifneq ($(DEVICES),)
export CUDA_VISIBLE_DEVICES := $(DEVICES)
endif

settings = --scratch '$(SCRATCH)' --runtime '$(RUNTIME)' --gpus '$(GPUS)' --seed '$(SEED)' \
	$(if $(SOURCE),--source '$(SOURCE)') $(if $(CORPUS),--corpus '$(CORPUS)') \
	$(if $(SAMPLES),--samples '$(SAMPLES)') $(if $(SEQ_LEN),--seq-len '$(SEQ_LEN)')
stage = .venv/bin/python -m scripts.stage
run = $(stage) run

# Stops with a fact and a hint when there is no Python to build the environment with.
need_python = if [ -z "$(PYTHON)" ]; then \
	echo 'error: no Python 3.11 or 3.12 runs here' >&2; \
	echo 'hint: apt-get install python3 python3-venv, or make $@ PYTHON=<path>' >&2; exit 1; fi

.PHONY: help
help: ## Show this
	@echo 'make <target> [PROFILE=tiny|flash] [SCRATCH=scratch] [RUNTIME=host|docker] [GPUS=1] [DEVICES=0]'
	@echo '              [SOURCE=<folder>] [CORPUS=<file>] [SAMPLES=<n>] [SEQ_LEN=<n>] [SEED=42]'
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

.PHONY: demo
demo: env ## The whole pipeline on models/tiny, ending with a table; needs no GPU
	@$(run) fetch calibrate postprocess verify rtn postprocess-rtn evaluate report --title demo --profile tiny $(settings)

.PHONY: artifact
artifact: env ## The verified artifact of PROFILE: fetch, calibrate, postprocess, verify
	@$(run) fetch calibrate postprocess verify --title artifact --profile '$(PROFILE)' $(settings)

.PHONY: fetch
fetch: env ## Download the upstream checkpoint at its pinned revision, resumable
	@$(run) $@ --profile '$(PROFILE)' $(settings)

.PHONY: dequant
dequant: env ## The checkpoint in BF16 with MTP, for other tools; the pipeline does not need it
	@$(run) $@ --profile '$(PROFILE)' $(settings)

.PHONY: calibrate
calibrate: env ## GPTQ of the routed experts, one file a layer, resumable
	@$(run) $@ --profile '$(PROFILE)' $(settings)

.PHONY: postprocess
postprocess: env ## Layer files and pass-through tensors to the artifact
	@$(run) $@ --profile '$(PROFILE)' $(settings)

.PHONY: verify
verify: env ## Check every tensor of the artifact, write its certificate
	@$(run) $@ --profile '$(PROFILE)' $(settings)

.PHONY: why
why: env ## Say why STAGE=<stage> would run, or that it is up to date
	@$(stage) why '$(STAGE)' --profile '$(PROFILE)' $(settings)

.PHONY: test
test: env ## Tests that need neither GPU nor docker; TESTS=tests/test_pins.py picks
	@.venv/bin/python -m pytest $(TESTS)

.PHONY: lint
lint: env ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

.PHONY: ci
ci: lint test ## What CI runs

.PHONY: env
env: ## Build .venv from the locks when they changed; other targets do it by themselves
	@$(need_python)
	@$(PYTHON) -m scripts.env $(if $(filter env,$(MAKECMDGOALS)),,--quiet)

.PHONY: lock
lock: ## Write the hash locks in docker/ from versions.env
	@$(need_python)
	@$(PYTHON) -m scripts.lock

.PHONY: clean
clean: ## Remove what stages wrote for PROFILE; keeps the download and .venv
	@folder='$(or $(SCRATCH),$(error SCRATCH is empty))/$(or $(PROFILE),$(error PROFILE is empty))'; \
	rm -rf -- "$$folder"/{dequant,layers,layers-rtn,artifact,artifact-rtn,reports,logs} "$$folder"/layers*.old-*; \
	if [ -d "$$folder/.stamps" ]; then \
	find "$$folder/.stamps" -name '*.json' ! -name fetch.json ! -name digests.json -delete; fi
