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

# What a command may set, each with a line `## NAME=<form>: what it is`, which `make help-<group>` shows and by which
# v4forge/makefile.py judges what it was given: 1 is a switch, another number is a number, a|b is one of these.

## PROFILE=tiny|flash: the model: the one in models/tiny, or DeepSeek-V4-Flash
PROFILE := tiny
## SCRATCH=<folder>: everything is written below SCRATCH/PROFILE
SCRATCH := scratch
## RUNTIME=host|docker: where programs run; else host for tiny, docker for flash
RUNTIME :=
## GPUS=8: GPUs that share the work
GPUS := 1
## DEVICES=0,1: these GPUs, by number
DEVICES :=
## SOURCE=<folder>: another checkpoint than the profile's
SOURCE :=
## CORPUS=<file>: another text to calibrate on, or hub:<owner>/<name>@<commit>,split=<split>,column=<column>
CORPUS :=
## BAD_TEXT=replace|refuse: what becomes of what is no text in it
BAD_TEXT :=
## RECIPE=int4|mixed: which tensor gets which precision
RECIPE :=
## SAMPLES=64: to calibrate on, else the profile's
SAMPLES :=
## SEQ_LEN=512: tokens of a sample, else the profile's
SEQ_LEN :=
## DEEP=1024: tokens of held-out text that demo compares on, else 8192
DEEP :=
## SEED=42: of everything that is drawn
SEED := 42
## STAGE=<stage>: about which make why is asked
STAGE := calibrate
## FROM=<folder>: has the checkpoint, which fetch then takes from there
FROM :=
## DRY_RUN=1: stages say what they would do
DRY_RUN :=
## ON=8xH200: a kind of v4forge/pipeline/machines.toml to plan for, then flash unless PROFILE says; else this machine
ON :=
## PRICE=30: of an hour of the machine, in any currency
PRICE :=
## NETWORK_GB_S=1.25: gigabytes a second that the download brings
NETWORK_GB_S :=
## WATCH=1: go on until the run is done
WATCH :=
## JSON=1: for programs
JSON :=
## MANIFEST=<manifest.json>: of an artifact, else the one of PROFILE
MANIFEST :=
## REPO=<org>/<name>: where publish uploads to
REPO :=
## CONFIRM=1: upload it
CONFIRM :=
## SET="NAME=VALUE …": of an image, its build arguments; of vLLM, its options; of image-lock, the pins
SET :=
## IMAGE=calib|serve: one of the two images
IMAGE :=
## LANE=<lane>: of calib cuda or cpu, of serve wheel or source; else the first that fits
LANE :=
## BASE_IMAGE=<image>: build on it; else the pinned one, or a Debian made here where no registry answers
BASE_IMAGE :=
## REGISTRY=<host>/<path>: where the images go
REGISTRY :=
## SIGN_KEY=<file>: private key, PEM, that signs images and certificates
SIGN_KEY :=
## VERIFY_KEY=<file>: public key, PEM, whose signature they must have
VERIFY_KEY :=
## ARTIFACT=<folder>: else the one that PROFILE has in SCRATCH
ARTIFACT :=
## BACKEND=cuda|cpu: what serves; cpu is for tests
BACKEND := cuda
## SERVE_PROFILE=<name>: of docker/serve/settings.toml; else production, and published for benches
SERVE_PROFILE :=
## REPLICAS=2: else as many as there are GPUs for
REPLICAS :=
## TP=4: GPUs of a replica, 1, 2, 4 or 8; else the serve profile's
TP :=
## DRAFTS=2: tokens a step, 0 for none; several for bench-speed, as "0 2"
DRAFTS :=
## BIND=<address>: 0.0.0.0 opens it to the network
BIND := 127.0.0.1
## PORT=8000: of the endpoint
PORT := 8000
## API_KEY_FILE=<file>: keys of which clients must send one; API_KEY of the environment does as well
API_KEY_FILE :=
## CERT=<file>: PEM, the endpoint speaks TLS with it
CERT :=
## KEY=<file>: PEM, its key
KEY :=
## QUEUE=1024: requests that may wait at a replica
QUEUE :=
## PER_SOURCE=64: connections that an address may have
PER_SOURCE :=
## DRAIN=600: seconds that a stop waits for what runs
DRAIN :=
## WATCHDOG=180: seconds that a replica may hang, 0 for ever
WATCHDOG :=
## METRICS=1: Prometheus and Grafana too
METRICS :=
## ALLOW="<guard> …": guards and probe checks that may fail
ALLOW :=
## CHECK=contents|sizes: how the artifact is compared with its certificate; contents, each byte once for a folder
CHECK :=
## KEEP=1: leave what was started when the probe fails
KEEP :=
## TIMEOUT=7200: seconds until replicas are ready
TIMEOUT :=
## NAMES="replica0 router": whose logs
NAMES :=
## SYSTEM="<text>": what the model is told first, in make chat
SYSTEM :=
## THINKING=1: it thinks first, in make chat
THINKING :=
## URL=<url>: what is served there is measured, or talked with
URL :=
## MODEL=<name>: which one, where several are served
MODEL :=
## LIMIT=2: a trial of so many of each kind, no result
LIMIT :=
## FRESH=1: do not continue an interrupted run
FRESH :=
## BASELINE=<folder>: another checkpoint, served alike and measured after ARTIFACT
BASELINE :=
## DATASETS=<folder>: local copies of the data sets
DATASETS :=
## WITH="--option …": further options of the program
WITH :=
## A=<reports or result file>: one run of the benches
A :=
## B=<reports or result file>: the other one
B :=
# What pytest runs besides its options in pyproject.toml: everything that needs no more than this machine, on all cores,
# each file on one, since its tests share what is made for them.
# Soak is what repeats: `make ci` has the first few of each.
parallel = -n logical --maxprocesses 8 --dist loadfile
## TESTS=<file>: these tests, by file, folder or options of pytest
TESTS := $(parallel) -m "not images and not gpu and not serve and not soak"
# Where the tests are that serve.
served := tests/vllm tests/project/test_upstream.py tests/project/test_metrics_profile.py tests/project/test_alerts.py
soaked := soak or (hypothesis and not images and not gpu and not serve)

## PYTHON=<python>: 3.11 or 3.12, with which the environment is built
# A name on PATH may be a shim, of a version that is not installed: only running it tells, which is done once, since a shim
# takes longer than Python does; what it leads to is called from then on. The first is the one of the environment that is
# there, which another one would build anew.
PYTHON = $(eval PYTHON := $(found_python))$(PYTHON)
found_python = $(shell for python in $$(test -L .venv/bin/python && readlink -f .venv/bin/python) python3.12 python3.11 python3; do \
	if $$python -E -S -c 'import sys; fits = (3, 11) <= sys.version_info[:2] < (3, 13); fits and print(sys.executable); sys.exit(not fits)' 2>/dev/null; \
	then break; fi; done)

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
bench_options = --reports $(call quoted,$(value SCRATCH)/$(value PROFILE)/reports$(baseline_results)) $(serve_options) $(serve_start) --seed $(call q,SEED) \
	$(if $(value URL),--url $(call q,URL)) $(if $(value MODEL),--model $(call q,MODEL)) $(if $(value LIMIT),--limit $(call q,LIMIT)) $(if $(value FRESH),--fresh) $(if $(value BASELINE),--baseline $(call q,BASELINE)) $(WITH)
# Of the benches that `make bench` calls for the baseline: where its results go.
baseline_results :=

# Stops with a fact and a hint when there is no Python to build the environment with.
need_python = if [ -z "$(PYTHON)" ]; then \
	echo 'error: no Python 3.11 or 3.12 runs here' >&2; \
	echo 'hint: apt-get install python3 python3-venv, or make $@ PYTHON=<path>' >&2; exit 1; fi

# The variables of make's command line, as words of a shell: a hint's commands get those that they read (v4forge/errors.py).
# A variable that no goal reads, and a value that is none, end make before anything runs.
given_names := $(strip $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name))))
export V4FORGE_GIVEN := $(foreach name,$(given_names),$(call quoted,$(name)=$(value $(name))))
goals = $(or $(wildcard .venv/bin/python),$(PYTHON)) -E -S -m scripts.goals
ifeq ($(MAKELEVEL)-$(if $(given_names),given),0-given)
ifneq ($(filter-out -%,$(firstword $(goals))),)
$(shell $(goals) check $(or $(MAKECMDGOALS),$(.DEFAULT_GOAL)) -- $(V4FORGE_GIVEN) >&2)
ifeq ($(.SHELLSTATUS),2)
$(error nothing was run)
endif
endif
endif

.PHONY: help
help: ## Show this
	@$(need_python)
	@$(goals) help

help-pipeline help-serve help-bench help-images help-develop:
	@$(need_python)
	@$(goals) $@

.DEFAULT:
	@$(need_python)
	@$(goals) check $@

# A folder is no target: without a rule make would say of one that is there that it is up to date.
folders = $(filter-out docs,$(patsubst %/,%,$(wildcard */)))
.PHONY: $(sort $(folders))
$(folders):
	@$(need_python)
	@$(goals) check $@

# A line `##@ <group>: <targets>` begins a group; `make help` shows these of its targets.

##@ Start here: demo doctor plan artifact serve

##@ Pipeline: status reproduce publish

.PHONY: demo
demo: env ## The whole pipeline on models/tiny, without a GPU; ends with a table
	@$(run) fetch calibrate postprocess rtn postprocess-rtn verify-deep card report --title demo \
		--next 'make plan PROFILE=flash ON=8xH200' --profile tiny $(settings) $(if $(value DEEP),--deep $(call q,DEEP))

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
doctor: env ## What could go wrong on this machine, and what helps; JSON=1
	@.venv/bin/python -m scripts.doctor $(work) --profile $(call q,PROFILE) --gpus $(call q,GPUS) --runtime $(call q,RUNTIME) \
		$(if $(value SOURCE),--source $(call q,SOURCE)) $(if $(value CORPUS),--corpus $(call q,CORPUS)) \
		$(if $(value SAMPLES),--samples $(call q,SAMPLES)) $(if $(value SEQ_LEN),--seq-len $(call q,SEQ_LEN)) $(if $(value JSON),--json)

.PHONY: plan
plan: env ## Disk, memory, hours and money of a run; on this machine, or ON=8xH200
	@.venv/bin/python -m scripts.plan $(if $(value SOURCE),--source $(call q,SOURCE),--profile \
		$(if $(and $(value ON),$(filter file,$(origin PROFILE))),flash,$(call q,PROFILE))) $(work) \
		$(if $(and $(value ON),$(filter file,$(origin GPUS))),,--gpus $(call q,GPUS)) $(if $(value ON),--on $(call q,ON)) \
		$(if $(value SAMPLES),--samples $(call q,SAMPLES)) $(if $(value SEQ_LEN),--seq-len $(call q,SEQ_LEN)) \
		$(if $(value RECIPE),--recipe $(call q,RECIPE)) $(if $(value PRICE),--price $(call q,PRICE)) $(if $(value NETWORK_GB_S),--network-gb-s $(call q,NETWORK_GB_S)) \
		$(if $(value JSON),--json) $(WITH)

.PHONY: status
status: env ## How far the run is, and when it will be done; WATCH=1 until it is; JSON=1
	@.venv/bin/python -m scripts.status $(work) $(if $(value WATCH),--watch) $(if $(value JSON),--json)

.PHONY: reproduce
reproduce: env ## Make an artifact again and compare, layer by layer; MANIFEST=<manifest.json>
	@.venv/bin/python -m scripts.replay $(call quoted,$(or $(value MANIFEST),$(value SCRATCH)/$(value PROFILE)/artifact/manifest.json)) \
		--scratch $(call q,SCRATCH) --profile $(call q,PROFILE) --runtime $(call q,RUNTIME) --gpus $(call q,GPUS) \
		$(if $(value SOURCE),--source $(call q,SOURCE)) $(if $(value CORPUS),--corpus $(call q,CORPUS)) $(if $(value DRY_RUN),--dry-run)

.PHONY: publish
publish: env ## What an upload to REPO would do; with CONFIRM=1 does it, and reads it back
	@.venv/bin/python -m scripts.publish --artifact $(call quoted,$(artifact)) \
		--repo $(call q,REPO) $(verify_key) $(if $(value CONFIRM),--yes) $(WITH)

.PHONY: release-check
release-check: env ## Whether tree, locks, images, certificate, reports and card are one release
	@.venv/bin/python -m scripts.release_check $(work) $(verify_key) $(if $(value JSON),--json)

##@ Serve: serve-status chat serve-stop

.PHONY: serve
serve: env ## Replicas of ARTIFACT behind one endpoint; ready and probed, on BIND:PORT; those that run become it one by one
	@$(serve) up $(serve_options) $(serve_start)

.PHONY: serve-print
serve-print: env ## The settings with their reasons, and the exact command of each replica
	@$(serve) print $(serve_options)

.PHONY: serve-status
serve-status: env ## Replicas, queue, tokens a second, drafts, KV cache
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

.PHONY: chat
chat: env ## Talk with what is served, or answer what is piped in; URL=
	@.venv/bin/python -m scripts.chat $(serve_folder) $(serve_keys) $(if $(value URL),--url $(call q,URL)) \
		$(if $(value MODEL),--model $(call q,MODEL)) $(if $(value SYSTEM),--system $(call q,SYSTEM)) \
		$(if $(value THINKING),--thinking) $(WITH)

.PHONY: serve-pairs
serve-pairs: env ## Which GPUs make the best pairs, by NVLink and NUMA node
	@$(serve) pairs

.PHONY: env-serve
env-serve: ## The environment of RUNTIME=host on GPUs: vLLM's release with our patches and plugin, and CUDA's compiler
	@$(need_python)
	@PYTHONPATH=. $(PYTHON) docker/serve/environment.py host .venv-serve

.PHONY: env-serve-cpu
env-serve-cpu: ## The environment of BACKEND=cpu: vLLM for the CPU with our plugins
	@$(need_python)
	@$(PYTHON) -m scripts.env --environment serve-cpu --into .venv-serve-cpu

##@ Bench: bench report compare

.PHONY: bench
bench: env ## All benches of ARTIFACT, then the report; serves by itself; BASELINE=<folder> beside it; resumable; LIMIT=2 tries it
	@if [ -z $(call q,URL) ] && [ -e $(call quoted,$(value SCRATCH)/$(value PROFILE)/serve/serving.json) ]; then \
	$(goals) error 'replicas of $(PROFILE) are served already, where bench starts its own' \
	'make serve-stop, or measure them as they are: make bench URL=http://$(BIND):$(PORT)'; fi
	@if [ -n $(call q,BASELINE) ]; then \
	if [ ! -e $(call quoted,$(value BASELINE)/config.json) ]; then \
	$(goals) error 'there is no checkpoint in BASELINE=$(BASELINE): no config.json' 'make bench BASELINE=<folder of a checkpoint>'; fi; \
	if [ -n $(call q,URL) ]; then \
	$(goals) error 'a baseline is served here, and URL says that something is served already' 'leave one of them out'; fi; fi
	@failed=; try() { $(MAKE) "$$@" || failed="$$failed $$1"; }; \
	trap 'exit 130' INT TERM; $(if $(value URL),,trap '$(MAKE) serve-stop' EXIT;) \
	all() { try bench-speed BASELINE= "$$@"; \
	if $(if $(value URL),true,$(MAKE) serve SERVE_PROFILE=$(or $(SERVE_PROFILE),published) DRAFTS='$(lastword $(DRAFTS))' SET='$(or $(SET),$(longest))' "$$@"); \
	then try bench-draft DRAFTS= BASELINE= "$$@"; try bench-quality DRAFTS= BASELINE= "$$@"; try bench-tools DRAFTS= BASELINE= "$$@"; \
	else failed="$$failed serve"; fi; }; \
	all; \
	$(if $(value BASELINE),$(MAKE) serve-stop; all ARTIFACT=$(call q,BASELINE) baseline_results=/baseline ALLOW='$(ALLOW) certificate';) \
	try report; \
	[ -z "$$failed" ] || $(goals) error "not finished:$$failed" 'make bench goes on from there'

.PHONY: bench-speed
bench-speed: env ## TTFT, TPOT, throughput and goodput for k = 0 to 3, by concurrency
	@$(bench) speed $(bench_options)

.PHONY: bench-draft
bench-draft: env ## Acceptance rate and length of drafts: random tokens, code, chat, prose
	@$(bench) draft $(bench_options)

.PHONY: bench-quality
bench-quality: env ## lm-eval's tasks of the published table; DATASETS=<folder> for local copies
	@$(bench) quality $(bench_options) $(if $(value DATASETS),--datasets $(call q,DATASETS))

.PHONY: bench-tools
bench-tools: env ## Tool calls in 15 scenarios, and short chats with known outcomes
	@$(bench) tools $(bench_options)

.PHONY: report
report: env ## The page of PROFILE's reports: index.html, its tables as benchmarks.md, figures.csv; PRICE=30
	@.venv/bin/python -m scripts.report --work $(call quoted,$(value SCRATCH)/$(value PROFILE)) $(if $(value PRICE),--price $(call q,PRICE))

.PHONY: compare
compare: env ## Two runs of the benches beside each other; A=<reports or result file> B=<the other>
	@.venv/bin/python -m scripts.compare $(call q,A) $(call q,B)

##@ Images: images pull

.PHONY: images
images: env ## Build the images; IMAGE= one of them; LANE=, BASE_IMAGE=, SET="ARG=VALUE …" choose how
	@$(image) build $(or $(IMAGE),calib serve) --documents $(call quoted,$(value SCRATCH)/images) $(if $(value SET),--set $(SET)) \
		$(if $(value LANE),--lane $(call q,LANE)) $(if $(value BASE_IMAGE),--base $(call q,BASE_IMAGE))

.PHONY: image-reproduce
image-reproduce: env ## Build IMAGE twice without cache and compare everything
	@.venv/bin/python -m scripts.reproduce $(call quoted,$(or $(value IMAGE),calib)) \
		$(if $(value LANE),--lane $(call q,LANE)) $(if $(value BASE_IMAGE),--base $(call q,BASE_IMAGE))

.PHONY: push
push: env ## Push the images to REGISTRY; with SBOM and provenance, and writes images.lock
	@$(image) push $(or $(IMAGE),calib serve) --documents $(call quoted,$(value SCRATCH)/images) \
		--to $(call q,REGISTRY) $(if $(value SIGN_KEY),--sign-key $(call q,SIGN_KEY))

.PHONY: pull
pull: env ## Pull the images by the digests of images.lock; any other is refused
	@$(image) pull $(or $(IMAGE),calib serve) --documents $(call quoted,$(value SCRATCH)/images) \
		$(if $(value VERIFY_KEY),--verify-key $(call q,VERIFY_KEY))

.PHONY: shell
shell: env ## A shell in IMAGE with what a stage sees
	@$(image) shell $(or $(IMAGE),calib) --scratch $(call q,SCRATCH) --gpus $(call q,GPUS)

##@ Develop: test lint ci

.PHONY: test
test: env ## Tests that need neither GPU nor docker; TESTS=tests/ground/test_pins.py picks
	@.venv/bin/python -m pytest $(TESTS)

.PHONY: test-images
test-images: env ## Tests that need docker: builds, registry, stages in containers
	@.venv/bin/python -m pytest -m "images and not soak" tests/docker

.PHONY: test-serve
test-serve: env env-serve-cpu ## Tests that serve with a real vLLM on the CPU; needs haproxy and prometheus
	@.venv/bin/python -m pytest -n 2 --dist loadgroup -m "serve and not soak" $(served)

.PHONY: soak
soak: env env-serve-cpu ## What make ci does a few times, many times: kills, random examples, cold builds; hours
	@.venv/bin/python -m pytest -m $(call q,soaked) --hypothesis-profile soak --timeout 3600

.PHONY: docs-check
docs-check: env ## Run every command of README.md and docs/, those for GPUs and networks dry
	@.venv/bin/python -m dev.docs_check

.PHONY: docs
docs: env ## Run docs/tour.ipynb, then build the site of these pages, scratch/site/index.html
	@.venv/bin/python -m dev.docs_site

.PHONY: lint
lint: env ## ruff, mypy, hadolint, shellcheck, schemas
	@.venv/bin/python -m dev.lint

.PHONY: lock-check
lock-check: ## Fail where a lock, Dockerfile or document disagrees with versions.env; offline
	@$(need_python)
	@$(PYTHON) -m dev.lock_check

.PHONY: ci
ci: env ## What CI runs; lint, lock-check, docs-check and all tests, then the seconds of each; needs docker
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
		"$$folder"/reports/{run.json,engines.json,index.html,benchmarks.md,figures.csv,card.html} "$$folder"/.cache/bytecode; \
	if [ -d "$$folder/.stamps" ]; then \
	find "$$folder/.stamps" -name '*.json' ! -name fetch.json ! -name digests.json ! -name disk.json -delete; fi
