# The commands of this repository. `make` or `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test test-python test-short simulate model cover robustness robustness-campaign robustness-mutants lint lint-python fmt generate check-generated build bench bench-python tools clean

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GOFILES := $(shell git ls-files --cached --others --exclude-standard '*.go' go.mod go.sum 'migrations/*.sql' 2>/dev/null)

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

run: build ## Run everything on this machine: PostgreSQL, Kafka broker, server, relay, demo source. Ctrl-C ends it (DEVFLAGS: flags of `outbox dev`)
	@bin/outbox dev $(DEVFLAGS)

build: bin/outbox ## Build bin/outbox

bin/outbox: $(GOFILES)
	go build -ldflags "-X main.version=$(VERSION)" -o bin/outbox ./cmd/outbox

test: ## Run every test, with the race detector, against real PostgreSQL and Kafka (see CONTRIBUTING.md)
	@if [ -x test/prerequisites.sh ]; then test/prerequisites.sh; fi
	go test -race -timeout 30m $(TESTFLAGS) ./...
	@$(MAKE) --no-print-directory test-python

test-python: build ## Run every test of the Python SDK (PYTESTFLAGS), and its unit tests on every supported Python that is there
	tools/python-test.sh $(PYTESTFLAGS)

simulate: ## Drive relay, writer and resolver through SCHEDULES=20000 seeded interleavings from SEED=1 (see test/simulation)
	go test -tags mutant ./test/simulation -run 'TestTeeth' -timeout 20m
	go test ./test/simulation -run 'TestSchedules' -v -timeout 20m -schedules $(or $(SCHEDULES),20000) -seed $(or $(SEED),1)

model: ## Check the protocol with Spin, and that each of its rules is needed (see test/model)
	test/model/run.sh

cover: ## Run every test, print the coverage, and fail below 85 % of store, relay, server, client and below 100 % of test/coverage/paths.txt
	go test -timeout 30m -coverprofile=cover.out -coverpkg=./store/...,./relay/...,./server/...,./client/... ./...
	@go run ./test/coverage -v cover.out

lint: ## Lint Go, Python, protos and the API's compatibility with main (or BASE=revision)
	tools/third-party.sh
	tools/golangci-lint.sh run
	tools/buf.sh lint
	tools/buf.sh format --diff --exit-code proto
	tools/breaking.sh
	@$(MAKE) --no-print-directory lint-python

PYTHON_DRIVER = ../../test/robustness/driver/python

lint-python: ## Lint the Python SDK and the robustness suite's driver: ruff, mypy strict
	tools/python-sdk.sh default ruff check
	tools/python-sdk.sh default ruff format --check
	tools/python-sdk.sh default env MYPYPATH=src mypy
	tools/python-sdk.sh default ruff check $(PYTHON_DRIVER)
	tools/python-sdk.sh default ruff format --check $(PYTHON_DRIVER)
	tools/python-sdk.sh default env MYPYPATH=src mypy $(PYTHON_DRIVER)
	tools/python-sdk.sh default ruff check ../../examples/file-service
	tools/python-sdk.sh default ruff format --check ../../examples/file-service
	tools/python-sdk.sh default bash -c 'cd ../../examples/file-service && mypy'

fmt: ## Format Go, Python and protos
	tools/golangci-lint.sh fmt
	tools/python-sdk.sh default ruff check --fix --select I
	tools/python-sdk.sh default ruff format
	tools/python-sdk.sh default ruff check --fix --select I $(PYTHON_DRIVER)
	tools/python-sdk.sh default ruff format $(PYTHON_DRIVER)
	tools/third-party.sh
	tools/buf.sh format -w proto

generate: ## Generate gen/go, gen/python and the Python SDK's _gen from proto/
	tools/third-party.sh
	tools/buf.sh format -w proto
	tools/generate.sh .

check-generated: ## Fail when gen/ is not what proto/ says
	tools/check-generated.sh

bench: build ## Measure against what a team would write instead; BENCHFLAGS are those of `outbox bench`
	bin/outbox bench $(BENCHFLAGS)

bench-python: build ## Measure what an event costs an async SQLAlchemy transaction; BENCHFLAGS are those of client/python/bench/overhead.py
	@tools/python-sdk.sh default python bench/overhead.py $(BENCHFLAGS)

# The suite kills processes at points that only builds with the tag failpoints have; mutants exist only with the tag mutant.
SECONDS ?= 90
SEED ?= 1
BROKER ?= kfake
MUTANTS_TABLE ?= test/robustness/README.md
ROBUSTNESS_LD = -ldflags "-X main.version=$(VERSION) -X main.revision=$(VERSION)"

bin/robustness: $(GOFILES)
	go build $(ROBUSTNESS_LD) -tags failpoints -o bin/robustness ./test/robustness

bin/outbox-failpoints: $(GOFILES)
	go build $(ROBUSTNESS_LD) -tags failpoints -o bin/outbox-failpoints ./cmd/outbox

bin/robustness-mutant: $(GOFILES)
	go build $(ROBUSTNESS_LD) -tags failpoints,mutant -o bin/robustness-mutant ./test/robustness

bin/outbox-mutant: $(GOFILES)
	go build $(ROBUSTNESS_LD) -tags failpoints,mutant -o bin/outbox-mutant ./cmd/outbox

# An earlier version that runs beside this one: OLD=revision. Its schema must be one that this version accepts, and the other way round.
# A campaign takes EARLIER where the history is there: the first with the present revision of the schema, or a later one.
OLD ?=
EARLIER = a6be4a7
OLD_PROGRAM = $(if $(OLD),bin/outbox-old-$(OLD))

bin/outbox-old-%:
	git worktree add --force --detach bin/old-$* $*
	cd bin/old-$* && go build -o ../outbox-old-$* ./cmd/outbox
	git worktree remove --force bin/old-$*

robustness: bin/robustness bin/outbox-failpoints $(OLD_PROGRAM) ## Break everything for SECONDS with SEED (BROKER=apache3: real Kafka) and judge; the last line is the verdict
	@bin/robustness run --program bin/outbox-failpoints --length $(SECONDS)s --seed $(SEED) \
		$(patsubst apache%,--apache=%,$(filter apache%,$(BROKER))) $(if $(OLD),--old=$(OLD_PROGRAM)) $(FLAGS)

CAMPAIGN_OLD = $(or $(OLD),$(shell git cat-file -e $(EARLIER)^{commit} 2>/dev/null && echo $(EARLIER)))

robustness-campaign: bin/robustness bin/outbox-failpoints ## One seed after the other from SEED on, SECONDS each, until there are a million transactions over twenty of them (FLAGS: --seeds, --total, --rate, --mix)
	@$(if $(CAMPAIGN_OLD),$(MAKE) --no-print-directory bin/outbox-old-$(CAMPAIGN_OLD))
	@bin/robustness campaign --program bin/outbox-failpoints --length $(SECONDS)s --seed $(SEED) \
		$(patsubst apache%,--apache=%,$(filter apache%,$(BROKER))) $(if $(CAMPAIGN_OLD),--old=bin/outbox-old-$(CAMPAIGN_OLD)) $(FLAGS)

robustness-mutants: bin/robustness-mutant bin/outbox-mutant ## Put each of twelve known faults in, see that the suite notices, and write the table into its README
	@bin/robustness-mutant mutants --program bin/outbox-mutant --readme "$(MUTANTS_TABLE)" $(FLAGS)

tools: ## Fetch and build the pinned tools now rather than on first use
	tools/third-party.sh
	tools/buf.sh --version
	tools/golangci-lint.sh version
	tools/python.sh --version

clean: ## Remove what was built here (not the data of `make run`: that is .outbox)
	rm -rf bin third_party cover.out
