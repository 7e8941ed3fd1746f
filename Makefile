SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
# Goals are steps of one run, in their order, whatever -j says.
.NOTPARALLEL:
# What a shell has for its own Python is not for ours: another safetensors, another standard library, no current folder.
$(foreach name,$(filter-out PYTHON PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE PYTHONPYCACHEPREFIX PYTHONFAULTHANDLER,\
	$(filter PYTHON%,$(.VARIABLES))),$(eval unexport $(name)))

# A variable's value as one word of the shell, and any text so: paths may have blanks, quotes and dollars.
q = $(call quoted,$(value $(1)))
quoted = '$(subst ','\'',$(1))'

# The model: tiny is the one in models/tiny, flash is DeepSeek-V4-Flash.
PROFILE := tiny
# Everything is written below $(SCRATCH)/$(PROFILE).
SCRATCH := scratch
# host or docker; empty: host for tiny, docker for flash.
RUNTIME :=
GPUS := 1
DEVICES :=
# Empty: what the profile says (v4forge/pipeline/stages.py).
SOURCE :=
CORPUS :=
BAD_TEXT :=
RECIPE :=
SAMPLES :=
SEQ_LEN :=
SEED := 42
STAGE := calibrate
# FROM: a folder that has the checkpoint, for fetch. DRY_RUN=1: stages say what they would do. For plan, PRICE of an hour,
# and NETWORK_GB_S, gigabytes a second.
FROM :=
DRY_RUN :=
PRICE :=
NETWORK_GB_S :=
WATCH :=
JSON :=
# MANIFEST: that of an artifact, for reproduce. REPO: where publish uploads to, ORG/NAME, once CONFIRM=1.
MANIFEST :=
REPO :=
CONFIRM :=
# The images: IMAGE empty is both. BASE_IMAGE empty: the pinned one, or a Debian made here where no registry answers.
SET :=
IMAGE :=
LANE :=
BASE_IMAGE :=
REGISTRY :=
# PEM files: who signs images and certificates, and whose signature they must have.
SIGN_KEY :=
VERIFY_KEY :=
# Serving. SERVE_PROFILE is one of docker/serve/settings.toml, empty: production, and published for benches; SET other
# options of vllm serve; ALLOW names guards that may fail. The variable API_KEY of the environment, or the file, has the
# keys of which clients must send one. CERT and KEY, PEM: the endpoint speaks TLS with them.
ARTIFACT :=
BACKEND := cuda
SERVE_PROFILE :=
REPLICAS :=
# GPUs of a replica: 1, 2, 4 or 8. Empty: the profile's.
TP :=
DRAFTS :=
BIND := 127.0.0.1
PORT := 8000
API_KEY_FILE :=
CERT :=
KEY :=
QUEUE :=
PER_SOURCE :=
DRAIN :=
WATCHDOG :=
METRICS :=
ALLOW :=
# How the artifact is compared with its certificate: sizes, or contents, each byte once for a folder. Empty: contents.
CHECK :=
KEEP :=
TIMEOUT :=
NAMES :=
# Benchmarks. URL: measure what is served there, MODEL of several models; LIMIT: a trial of so many; FRESH: start anew; DATASETS: a folder of local
# copies; WITH: further options of the bench. A and B: two runs to compare, folders of reports or result files.
URL :=
MODEL :=
LIMIT :=
FRESH :=
DATASETS :=
WITH :=
A :=
B :=
# What pytest runs besides its options in pyproject.toml: everything that needs no more than this machine, on all cores,
# each file on one, since its tests share what is made for them.
# Soak is what repeats: `make ci` has the first few of each.
parallel = -n logical --maxprocesses 8 --dist loadfile
TESTS := $(parallel) -m "not images and not gpu and not serve and not soak"
# Where the tests are that serve.
SERVED := tests/vllm tests/project/test_upstream.py tests/project/test_metrics_profile.py tests/project/test_alerts.py
SOAK := soak or (hypothesis and not images and not gpu and not serve)

# A name on PATH may be a shim of a version that is not installed: only running it tells, which is done once.
PYTHON = $(eval PYTHON := $(found_python))$(PYTHON)
found_python = $(shell for python in python3.12 python3.11 python3; do \
	if $$python -E -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; \
	then echo $$python; break; fi; done)

ifneq ($(DEVICES),)
export CUDA_VISIBLE_DEVICES := $(DEVICES)
endif

settings = --scratch $(call q,SCRATCH) --runtime $(call q,RUNTIME) --gpus $(call q,GPUS) --seed $(call q,SEED) \
	$(if $(value SOURCE),--source $(call q,SOURCE)) $(if $(value CORPUS),--corpus $(call q,CORPUS)) \
	$(if $(value SAMPLES),--samples $(call q,SAMPLES)) $(if $(value SEQ_LEN),--seq-len $(call q,SEQ_LEN)) \
	$(if $(value BAD_TEXT),--bad-text $(call q,BAD_TEXT)) $(if $(value RECIPE),--recipe $(call q,RECIPE)) \
	$(if $(value FROM),--from $(call q,FROM)) $(if $(value DRY_RUN),--dry-run)
work = --work $(call quoted,$(value SCRATCH)/$(value PROFILE))
stage = .venv/bin/python -m scripts.stage
run = $(stage) run
image = .venv/bin/python -m scripts.image
certified = .venv/bin/python -m scripts.certified
serve = .venv/bin/python -m scripts.serve
serve_folder = --folder $(call quoted,$(value SCRATCH)/$(value PROFILE)/serve)
serve_options = $(serve_folder) --artifact $(call quoted,$(artifact)) \
	--backend $(call q,BACKEND) $(if $(value SERVE_PROFILE),--serve-profile $(call q,SERVE_PROFILE)) --bind $(call q,BIND) --port $(call q,PORT) \
	$(if $(value RUNTIME),--runtime $(call q,RUNTIME)) $(if $(value REPLICAS),--replicas $(call q,REPLICAS)) $(if $(value TP),--tp $(call q,TP)) \
	$(if $(value DEVICES),--devices $(call q,DEVICES)) $(if $(value DRAFTS),--drafts $(DRAFTS)) $(if $(value SET),--set $(SET)) \
	$(if $(value QUEUE),--queue $(call q,QUEUE)) $(if $(value PER_SOURCE),--per-source $(call q,PER_SOURCE)) \
	$(if $(value DRAIN),--drain $(call q,DRAIN)) $(if $(value WATCHDOG),--watchdog $(call q,WATCHDOG)) \
	$(if $(value METRICS),--metrics) \
	$(if $(value CERT),--cert $(call q,CERT)) $(if $(value KEY),--cert-key $(call q,KEY))
artifact = $(or $(value ARTIFACT),$(value SCRATCH)/$(value PROFILE)/artifact)
verify_key = $(if $(value VERIFY_KEY),--verify-key $(call q,VERIFY_KEY))
proof = $(if $(value CHECK),--check $(call q,CHECK)) $(verify_key)
signed = $(if $(value SIGN_KEY),@$(certified) sign $(call quoted,$(value SCRATCH)/$(value PROFILE)/artifact) --key $(call q,SIGN_KEY))
serve_keys = $(if $(value API_KEY_FILE),--api-key-file $(call q,API_KEY_FILE))
serve_start = $(proof) $(if $(value ALLOW),--allow $(ALLOW)) $(if $(value KEEP),--keep) $(if $(value TIMEOUT),--timeout $(call q,TIMEOUT)) \
	$(serve_keys)
bench = .venv/bin/python -m scripts.bench
# What the longest task of bench-quality asks for: aime24's answers have up to 32,768 tokens.
longest = max-model-len=40960
bench_options = --reports $(call quoted,$(value SCRATCH)/$(value PROFILE)/reports) $(serve_options) $(serve_start) --seed $(call q,SEED) \
	$(if $(value URL),--url $(call q,URL)) $(if $(value MODEL),--model $(call q,MODEL)) $(if $(value LIMIT),--limit $(call q,LIMIT)) $(if $(value FRESH),--fresh) $(WITH)

# Stops with a fact and a hint when there is no Python to build the environment with.
need_python = if [ -z "$(PYTHON)" ]; then \
	echo 'error: no Python 3.11 or 3.12 runs here' >&2; \
	echo 'hint: apt-get install python3 python3-venv, or make $@ PYTHON=<path>' >&2; exit 1; fi

.PHONY: help
help: ## Show this
	@echo 'make <target> [PROFILE=tiny|flash] [SCRATCH=scratch] [RUNTIME=host|docker] [GPUS=1] [DEVICES=0]'
	@echo '              [SOURCE=<folder>] [CORPUS=<file or hub:…>] [BAD_TEXT=replace] [RECIPE=mixed]'
	@echo '              [SAMPLES=<n>] [SEQ_LEN=<n>] [SEED=42] [DRY_RUN=1]'
	@echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

.PHONY: demo
demo: env ## The whole pipeline on models/tiny, ending with a table; needs no GPU
	@$(run) fetch calibrate postprocess rtn postprocess-rtn verify-deep card report --title demo --profile tiny $(settings)

.PHONY: artifact
artifact: env ## The verified artifact of PROFILE: fetch, calibrate, postprocess, verify, card
	@$(run) fetch calibrate postprocess verify card --title artifact --profile $(call q,PROFILE) $(settings)
	$(signed)

.PHONY: fetch
fetch: env ## Download the upstream checkpoint at its pinned revision, resumable, or take it FROM=<folder>
	@$(run) $@ --profile $(call q,PROFILE) $(settings)

.PHONY: dequant
dequant: env ## The checkpoint in BF16 with MTP, for other tools; the pipeline does not need it
	@$(run) $@ --profile $(call q,PROFILE) $(settings)

.PHONY: calibrate
calibrate: env ## GPTQ of the routed experts, one file a layer, resumable
	@$(run) $@ --profile $(call q,PROFILE) $(settings)

.PHONY: postprocess
postprocess: env ## Layer files and pass-through tensors to the artifact
	@$(run) $@ --profile $(call q,PROFILE) $(settings)

.PHONY: verify
verify: env ## Check every tensor of the artifact, write its certificate; SIGN_KEY=<file> signs it
	@$(run) $@ --profile $(call q,PROFILE) $(settings)
	$(signed)

.PHONY: certified
certified: env ## Whether ARTIFACT is the one that was certified: CHECK=sizes or contents, the default; VERIFY_KEY=<file>
	@$(certified) check $(call quoted,$(artifact)) $(proof)

.PHONY: card
card: env ## The model card, from manifest, certificate and what the benches measured
	@$(run) $@ --profile $(call q,PROFILE) $(settings)

.PHONY: peer
peer: env ## The same layers by llm-compressor's GPTQ: the report sets both beside each other
	@$(run) $@ --profile $(call q,PROFILE) $(settings)

.PHONY: why
why: env ## Say why STAGE=<stage> would run, or that it is up to date
	@$(stage) why $(call q,STAGE) --profile $(call q,PROFILE) $(settings)

.PHONY: doctor
doctor: env ## Everything that can go wrong on this machine, with the command that helps; JSON=1
	@.venv/bin/python -m scripts.doctor $(work) --profile $(call q,PROFILE) --gpus $(call q,GPUS) --runtime $(call q,RUNTIME) \
		$(if $(value SOURCE),--source $(call q,SOURCE)) $(if $(value CORPUS),--corpus $(call q,CORPUS)) \
		$(if $(value SAMPLES),--samples $(call q,SAMPLES)) $(if $(value SEQ_LEN),--seq-len $(call q,SEQ_LEN)) $(if $(value JSON),--json)

.PHONY: plan
plan: env ## What would run, with disk, memory, hours and, with PRICE= an hour, money
	@.venv/bin/python -m scripts.plan $(if $(value SOURCE),--source $(call q,SOURCE),--profile $(call q,PROFILE)) $(work) \
		--gpus $(call q,GPUS) $(if $(value SAMPLES),--samples $(call q,SAMPLES)) $(if $(value SEQ_LEN),--seq-len $(call q,SEQ_LEN)) \
		$(if $(value RECIPE),--recipe $(call q,RECIPE)) $(if $(value PRICE),--price $(call q,PRICE)) $(if $(value NETWORK_GB_S),--network-gb-s $(call q,NETWORK_GB_S)) \
		$(if $(value JSON),--json)

.PHONY: status
status: env ## From another terminal: how far the run is, and when it will be done; WATCH=1 until it is; JSON=1
	@.venv/bin/python -m scripts.status $(work) $(if $(value WATCH),--watch) $(if $(value JSON),--json)

.PHONY: reproduce
reproduce: env ## Make the artifact of MANIFEST=<manifest.json> again and compare, layer by layer
	@.venv/bin/python -m scripts.replay $(call quoted,$(or $(value MANIFEST),$(value SCRATCH)/$(value PROFILE)/artifact/manifest.json)) \
		--scratch $(call q,SCRATCH) --profile $(call q,PROFILE) --runtime $(call q,RUNTIME) --gpus $(call q,GPUS) \
		$(if $(value SOURCE),--source $(call q,SOURCE)) $(if $(value CORPUS),--corpus $(call q,CORPUS))

.PHONY: publish
publish: env ## What an upload to REPO=<org>/<name> would do; with CONFIRM=1 does it, and reads it back
	@.venv/bin/python -m scripts.publish --artifact $(call quoted,$(artifact)) \
		--repo $(call q,REPO) $(verify_key) $(if $(value CONFIRM),--yes) $(WITH)

.PHONY: release-check
release-check: env ## Whether tree, locks, images, certificate, reports and card are one release
	@.venv/bin/python -m scripts.release_check $(work) $(verify_key) $(if $(value JSON),--json)

.PHONY: images
images: env ## Build the images, or IMAGE=calib; LANE=, BASE_IMAGE=, SET="ARG=VALUE …" choose how
	@$(image) build $(or $(IMAGE),calib serve) --documents $(call quoted,$(value SCRATCH)/images) $(if $(value SET),--set $(SET)) \
		$(if $(value LANE),--lane $(call q,LANE)) $(if $(value BASE_IMAGE),--base $(call q,BASE_IMAGE))

.PHONY: image-reproduce
image-reproduce: env ## Build IMAGE twice without cache and compare everything
	@.venv/bin/python -m scripts.reproduce $(call quoted,$(or $(value IMAGE),calib)) \
		$(if $(value LANE),--lane $(call q,LANE)) $(if $(value BASE_IMAGE),--base $(call q,BASE_IMAGE))

.PHONY: push
push: env ## Push the images to REGISTRY with SBOM and provenance, write images.lock
	@$(image) push $(or $(IMAGE),calib serve) --documents $(call quoted,$(value SCRATCH)/images) \
		--to $(call q,REGISTRY) $(if $(value SIGN_KEY),--sign-key $(call q,SIGN_KEY))

.PHONY: pull
pull: env ## Pull the images by the digests of images.lock, refuse any other
	@$(image) pull $(or $(IMAGE),calib serve) --documents $(call quoted,$(value SCRATCH)/images) \
		$(if $(value VERIFY_KEY),--verify-key $(call q,VERIFY_KEY))

.PHONY: shell
shell: env ## A shell in IMAGE with what a stage sees
	@$(image) shell $(or $(IMAGE),calib) --scratch $(call q,SCRATCH) --gpus $(call q,GPUS)

.PHONY: serve
serve: env ## Replicas of ARTIFACT behind one endpoint on BIND:PORT, ready and probed; those that run become it one by one
	@$(serve) up $(serve_options) $(serve_start)

.PHONY: serve-print
serve-print: env ## The settings with their reasons, and the exact command of each replica
	@$(serve) print $(serve_options)

.PHONY: serve-status
serve-status: env ## Replicas, queue, tokens a second, draft acceptance, KV cache
	@$(serve) status $(serve_folder)

.PHONY: serve-logs
serve-logs: env ## Follow the logs of all, or NAMES="replica0 router"
	@$(serve) logs $(serve_folder) $(NAMES)

.PHONY: serve-reload
serve-reload: env ## Give what runs the keys of API_KEY_FILE, and its certificate anew; nothing is stopped
	@$(serve) reload $(serve_folder) $(serve_keys)

.PHONY: serve-stop
serve-stop: env ## Take nothing new, finish what runs, stop
	@$(serve) stop $(serve_folder)

.PHONY: serve-pairs
serve-pairs: env ## Which GPUs make the best pairs, by NVLink and NUMA node
	@$(serve) pairs

.PHONY: bench
bench: env ## Everything below about ARTIFACT, served by itself, then the report; resumable; LIMIT=2 tries it out
	@if [ -z $(call q,URL) ] && [ -e $(call quoted,$(value SCRATCH)/$(value PROFILE)/serve/serving.json) ]; then \
	echo 'error: replicas of $(PROFILE) are served already, where bench starts its own' >&2; \
	echo 'hint: make serve-stop, or measure them as they are: make bench URL=http://$(BIND):$(PORT)' >&2; exit 1; fi
	@failed=; try() { $(MAKE) "$$@" || failed="$$failed $$1"; }; \
	trap 'exit 130' INT TERM; $(if $(value URL),,trap '$(MAKE) serve-stop' EXIT;) \
	try bench-speed; \
	if $(if $(value URL),true,$(MAKE) serve SERVE_PROFILE=$(or $(SERVE_PROFILE),published) DRAFTS='$(lastword $(DRAFTS))' SET='$(or $(SET),$(longest))'); \
	then try bench-draft DRAFTS=; try bench-quality DRAFTS=; try bench-tools DRAFTS=; else failed="$$failed serve"; fi; \
	try report; \
	[ -z "$$failed" ] || { echo "error: not finished:$$failed" >&2; echo 'hint: make bench goes on from there' >&2; exit 1; }

.PHONY: bench-speed
bench-speed: env ## Time a token and tokens a second, with drafts and without, by requests at a time
	@$(bench) speed $(bench_options)

.PHONY: bench-draft
bench-draft: env ## How many drafts are accepted: random tokens, code, chat, prose
	@$(bench) draft $(bench_options)

.PHONY: bench-quality
bench-quality: env ## lm-eval's tasks of the published table; DATASETS=<folder> for local copies
	@$(bench) quality $(bench_options) $(if $(value DATASETS),--datasets $(call q,DATASETS))

.PHONY: bench-tools
bench-tools: env ## Tool calls in 15 scenarios, and short chats with known outcomes
	@$(bench) tools $(bench_options)

.PHONY: report
report: env ## One page of what PROFILE's reports hold: index.html, and its tables as benchmarks.md
	@.venv/bin/python -m scripts.report --work $(call quoted,$(value SCRATCH)/$(value PROFILE))

.PHONY: compare
compare: env ## Two runs of the benches beside each other, A=<reports or result file> B=<the other>
	@.venv/bin/python -m scripts.compare $(call q,A) $(call q,B)

.PHONY: env-serve
env-serve: ## The environment of RUNTIME=host on GPUs: vLLM's release with our patches and plugin, and CUDA's compiler
	@$(need_python)
	@PYTHONPATH=. $(PYTHON) docker/serve/environment.py host .venv-serve

.PHONY: env-serve-cpu
env-serve-cpu: ## The environment of BACKEND=cpu: vLLM for the CPU with our plugins
	@$(need_python)
	@$(PYTHON) -m scripts.env --environment serve-cpu --into .venv-serve-cpu

.PHONY: test
test: env ## Tests that need neither GPU nor docker; TESTS=tests/ground/test_pins.py picks
	@.venv/bin/python -m pytest $(TESTS)

.PHONY: test-images
test-images: env ## Tests that need docker: builds, registry, stages in containers
	@.venv/bin/python -m pytest -m "images and not soak" tests/docker

.PHONY: test-serve
test-serve: env env-serve-cpu ## Tests that serve with a real vLLM on the CPU; needs haproxy and prometheus
	@.venv/bin/python -m pytest -n 2 --dist loadgroup -m "serve and not soak" $(SERVED)

.PHONY: soak
soak: env env-serve-cpu ## What make ci does a few times, many times: kills, random examples, cold builds; hours
	@.venv/bin/python -m pytest -m $(call q,SOAK) --hypothesis-profile soak --timeout 3600

.PHONY: docs-check
docs-check: env ## Run every command of README.md and docs/, those for GPUs and networks dry
	@.venv/bin/python -m dev.docs_check

.PHONY: lint
lint: env ## ruff, mypy, hadolint, shellcheck, schemas
	@.venv/bin/python -m dev.lint

.PHONY: lock-check
lock-check: ## Fail where a lock, Dockerfile or document disagrees with versions.env; offline
	@$(need_python)
	@$(PYTHON) -m dev.lock_check

.PHONY: ci
ci: env ## What CI runs: lint, lock-check, docs-check and all tests, then the seconds of each; needs docker
	@.venv/bin/python -m dev.ci

.PHONY: env
env: ## Build .venv from the locks when they changed; other targets do it by themselves
	@$(need_python)
	@$(PYTHON) -m scripts.env $(if $(filter env,$(MAKECMDGOALS)),,--quiet)

.PHONY: lock
lock: ## Write the hash locks in docker/ from versions.env
	@$(need_python)
	@$(PYTHON) -m dev.lock

.PHONY: image-lock
image-lock: ## Set pins (SET="KEY=VALUE …"), resolve every lock, say what changed; all or nothing
	@$(need_python)
	@$(PYTHON) -m dev.lock $(SET)

.PHONY: clean
clean: ## Remove what stages wrote for PROFILE; keeps the download, what benches measured, and .venv
	@folder=$(call quoted,$(or $(value SCRATCH),$(error SCRATCH is empty))/$(or $(value PROFILE),$(error PROFILE is empty))); \
	rm -rf -- "$$folder"/{dequant,layers,layers-rtn,layers-peer,artifact,artifact-rtn,logs} "$$folder"/layers*.old-* $(call q,SCRATCH)/replay-*/$(call q,PROFILE) \
		"$$folder"/reports/{run.json,engines.json,index.html,benchmarks.md,card.html} "$$folder"/.cache/bytecode; \
	if [ -d "$$folder/.stamps" ]; then \
	find "$$folder/.stamps" -name '*.json' ! -name fetch.json ! -name digests.json ! -name disk.json -delete; fi
