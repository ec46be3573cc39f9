# `make` lists the targets.
PYTHON ?= python3
PORT   ?= 8000
FUZZ_INPUTS ?= 100000
MINUTES ?= 20
TEXTS  ?= 100000
REPEATS ?= 3
# Holds one folder per data set, each with train.parquet and test.parquet.
DATA   ?= data
# Texts of make bench: those of DATA if they exist, else generated ones. A DATA that is set but has no texts is an error.
NEWS    = $(if $(wildcard $(DATA)/ag_news/test.parquet),--data $(DATA)/ag_news/test.parquet,$(if $(filter file,$(origin DATA)),,$(error there is no $(DATA)/ag_news/test.parquet)))
# Version of the page /docs; NOTICE names it too.
SWAGGER_UI ?= 5.35.0
# Other servers that `make bench` compares with, if `make baselines` has installed them.
BASELINES ?= litserve bentoml infinity ray
# Index of torch builds without CUDA libraries, tried first on hosts without an NVIDIA GPU.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu

BIN   := .venv/bin
TORCH := $(shell grep ^torch== requirements/torch.in)
PIP   := $(BIN)/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help serve test test-compose test-cluster fuzz chaos soak check-answers audit sbom lint bench bench-quick baselines bench-gpu openapi proto swagger-ui docs lock clean

help: ## list the targets
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

serve: .venv/.serve ## install the packages for serving into .venv, then serve on 127.0.0.1:$(PORT)
	exec $(BIN)/budgetformer serve --port $(PORT)

test: lint ## run lint, types, import rules, and every test that needs no container
	$(BIN)/python -m pytest -n 2

test-compose: .venv/.dev ## build the images, start the stack under Docker and test it
	$(BIN)/python -m pytest tests/e2e/compose -m compose --timeout 1500 -v --log-cli-level INFO --durations 0

test-cluster: .venv/.cluster ## test the service on a Ray cluster on this machine, and the Helm chart against its schemas
	$(BIN)/python -m pytest tests/cluster -m cluster --timeout 900 -v --durations 0

fuzz: .venv/.dev ## give 100,000 broken inputs to each reader (HTTP, headers, frames, checkpoints, settings, bodies), and test the API contract
	OMP_NUM_THREADS=1 FUZZ_INPUTS=$(FUZZ_INPUTS) $(BIN)/python -m pytest tests/fuzz -n 2 --dist worksteal --showlocals --durations 20 --timeout 7200

chaos: .venv/.dev ## cause every kind of fault on a server under load, and print what its callers saw; some faults need root
	$(BIN)/python -m loadtests.chaos

soak: .venv/.dev ## run MINUTES=20 of mixed load and model changes; plot memory, files, threads and latency in build/soak
	$(BIN)/python -m loadtests.soak --minutes $(MINUTES)

check-answers: .venv/.dev ## compare TEXTS=100000 answers, requested during faults, with the reference network
	$(BIN)/python -m loadtests.answers --texts $(TEXTS)

lint: .venv/.dev ## check style, types, import rules and forbidden words
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell --dictionary - --dictionary docs/glossary.txt

bench: .venv/.dev ## check the speed targets (pass or short) of the compact pass, and of this service compared with other servers
	$(BIN)/python loadtests/bench.py --repeats $(REPEATS) $(BEFORE:%=--before %) $(NEWS)

bench-quick: .venv/.dev ## the same in three minutes, with fewer texts and servers; fails only on wrong answers
	$(BIN)/python loadtests/bench.py --quick $(NEWS)

baselines: $(BASELINES:%=build/baselines/%/.made) ## install the other servers of `make bench`: 3 GB in build/baselines

bench-gpu: .venv/.dev ## check and time every pass on a GPU, and measure its memory, in a few minutes
	$(BIN)/budgetformer bench gpu --model ag_news --out docs/benchmarks/gpu $(NEWS)

train-%: .venv/.dev ## train a shipped model again (train-ag_news, ...) from DATA/<name>; resumes an interrupted run
	$(BIN)/budgetformer train --data $(DATA)/$* --start minilm-l6 --recipe model_store/$*/recipe.toml --out model_store/$*/$(call version,$*)

dense-%: .venv/.dev ## train the dense baselines for a shipped model's report (dense-ag_news, ...), in build/dense
	$(BIN)/python -m budgetformer.experiments.baselines --data $(DATA)/$* --start minilm-l6 --recipe model_store/$*/recipe.toml --out build/dense/$*

train-paper_%: .venv/.dev ## train from scratch in the form of the paper (train-paper_ag_news)
	$(BIN)/budgetformer train --data $(DATA)/$* --recipe model_store/paper_$*/recipe.toml --out model_store/paper_$*/$(call version,paper_$*)

report-%: .venv/.dev ## write the frontier report of a shipped model on its test texts (report-ag_news, ...)
	$(BIN)/budgetformer evaluate --data $(DATA)/$*/test.parquet --model $* --report docs/benchmarks/$* $(if $(wildcard build/dense/$*),--baseline build/dense/$*) $(if $(LIMIT),--limit $(LIMIT))

audit: .venv/.audit ## look for known vulnerabilities of the locked packages; needs the network
	@$(BIN)/pip-audit --strict --requirement requirements/dev.txt --requirement requirements/torch.in --no-deps --disable-pip --progress-spinner off \
	|| { echo "audit: vulnerabilities are listed above, or the vulnerability service could not be reached" >&2; exit 1; }

sbom: .venv/.audit ## write the bill of materials of the image, CycloneDX, to build/sbom.json
	mkdir -p build
	cat requirements/image.txt requirements/torch.in | $(BIN)/cyclonedx-py requirements - --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json

openapi: .venv/.serve ## write docs/openapi.json from the routes
	$(BIN)/python -m service.http.openapi docs/openapi.json

proto: .venv/.dev ## compile service/grpc/*.proto
	cd service/grpc && ../../$(BIN)/python -m grpc_tools.protoc --proto_path . --descriptor_set_out messages.binpb inference.proto health.proto

swagger-ui: ## download the files of /docs: SWAGGER_UI=5.35.0, 1.9 MB; needs npm
	cd service/http/page && npm pack --silent swagger-ui-dist@$(SWAGGER_UI) && tar xzf swagger-ui-dist-$(SWAGGER_UI).tgz --strip-components 1 $(SWAGGER_FILES:%=package/%) && rm swagger-ui-dist-$(SWAGGER_UI).tgz

docs: .venv/.dev ## build the documentation into site/
	$(BIN)/mkdocs build --strict

lock: .venv/.dev ## resolve requirements/*.txt again from pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --output-file requirements/serve.txt requirements/torch.in pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --extra tracing --extra grpc --constraint requirements/serve.txt --output-file requirements/image.txt requirements/torch.in pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --output-file requirements/loadtest.txt requirements/loadtest.in
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --extra train --extra gpus --extra dev --extra bench --extra docs --extra remote --extra grpc --constraint requirements/serve.txt --output-file requirements/dev.txt requirements/torch.in pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --extra cluster --extra chart --constraint requirements/dev.txt --output-file requirements/cluster.txt requirements/torch.in pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile $(LOCK) --extra tracing --extra cluster --constraint requirements/image.txt --constraint requirements/cluster.txt --output-file requirements/ray.txt requirements/torch.in pyproject.toml
	$(BIN)/python requirements/hashes.py requirements/serve.txt requirements/image.txt requirements/dev.txt requirements/loadtest.txt requirements/cluster.txt requirements/ray.txt

clean: ## remove the environment and every cache
	rm -rf .venv build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

SWAGGER_FILES := swagger-ui.css swagger-ui-bundle.js swagger-ui-bundle.js.LICENSE.txt

# The highest version in the store, which is served; 1 if there is none.
version = $(or $(shell ls model_store/$1 | grep -x '[0-9]*' | sort -n | tail -1),1)

LOCK := --quiet --strip-extras --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
        --no-emit-options --annotation-style line --upgrade
# The lock files are complete and have hashes. torch is not in them, because its build depends on the host.
LOCKED := --no-deps --require-hashes --requirement

BASELINE_PIP = build/baselines/$*/bin/python -m pip --quiet --disable-pip-version-check
cpu-torch = $1 install --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX_URL) $(TORCH)+cpu || $1 install $(TORCH)

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "BudgetFormer needs Python 3.11 or newer; point PYTHON= at one")'
	$(PYTHON) -m venv .venv
	@touch $@

# torch is installed first, by itself: on a host without a GPU, its CUDA libraries would be gigabytes without a use.
.venv/.torch: .venv/.created requirements/torch.in
	@echo "installing $(TORCH), the packages of requirements/ follow: a minute or two"
	@if command -v nvidia-smi >/dev/null; then $(PIP) install $(TORCH); else $(call cpu-torch,$(PIP)); fi
	@touch $@

.venv/.serve: requirements/serve.txt pyproject.toml .venv/.torch
	$(PIP) install $(LOCKED) requirements/serve.txt
	$(PIP) install --no-deps --editable .
	@touch $@

.venv/.audit: pyproject.toml .venv/.dev
	$(PIP) install --editable ".[audit]"
	@touch $@

.venv/.dev: requirements/dev.txt requirements/triton.in .venv/.serve
	$(PIP) install $(LOCKED) requirements/dev.txt
	command -v nvidia-smi >/dev/null || $(PIP) install --no-deps --requirement requirements/triton.in
	@touch $@

.venv/.cluster: requirements/cluster.txt .venv/.dev
	$(PIP) install $(LOCKED) requirements/cluster.txt
	@touch $@

# The requirements of these servers conflict with ours. Only Infinity runs torch.
build/baselines/%/.made: loadtests/baselines/%.txt requirements/torch.in
	$(PYTHON) -m venv build/baselines/$*
	@$(if $(filter infinity,$*),$(call cpu-torch,$(BASELINE_PIP)))
	$(BASELINE_PIP) install --requirement $<
	@touch $@
