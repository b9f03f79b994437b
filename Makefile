# rewarm: `make help` lists the supported targets. All of them set up what they need, as root, on Debian 12 or 13.
SHELL := /bin/bash
.DEFAULT_GOAL := help

BUILD := $(CURDIR)/build
PREFIX := $(BUILD)/prefix
TESTENV := $(BUILD)/testenv
ROOTFS := $(BUILD)/rootfs
export REWARM_TEST_PREFIX := $(PREFIX)
export REWARM_TEST_ROOTFS := $(ROOTFS)
export PYTHONDONTWRITEBYTECODE := 1
# Of one file the tests stay together, since they share what they build. Those that are marked `alone` have the machine
# to themselves. By PYTEST_ARGS a run may be left without a test (status 5): that is an error if all are.
PARALLEL := -n 2 --dist loadfile

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: demo
demo: prefix rootfs ## install into build/, then capture a model server on one node and restore it on another
	@$(SYSTEM_PYTHON) demo/run.py $(PREFIX)

.PHONY: test
test: prefix rootfs testenv ## install into build/, then run the linters and every test
	@status=0; runs=0; empty=0; trap 'exit 130' INT; \
	run() { \
		local ended=0; $(TESTENV)/bin/pytest "$$@" $(PYTEST_ARGS) || ended=$$?; runs=$$((runs + 1)); \
		if [ $$ended = 5 ] && [ $(words $(PYTEST_ARGS)) != 0 ]; then empty=$$((empty + 1)); \
		elif [ $$ended != 0 ]; then status=$$ended; fi; \
	}; \
	run $(PARALLEL) tests/unit; \
	run $(PARALLEL) --only together tests/integration; \
	run --only alone tests/integration tests/gpu; \
	if [ $$empty = $$runs ]; then status=5; fi; \
	exit $$status

.PHONY: unit
unit: prefix testenv ## only the linters and the unit tests
	$(TESTENV)/bin/pytest $(PARALLEL) tests/unit $(PYTEST_ARGS)

.PHONY: bench
bench: prefix rootfs testenv ## measure both sides in one run, print a table, write bench.json
	@$(TESTENV)/bin/python tests/bench/run.py $(PREFIX) bench.json

.PHONY: install
install: ## install rewarm on this node (see install/install.sh --help)
	install/install.sh

.PHONY: uninstall
uninstall: ## remove rewarm from this node
	install/uninstall.sh

.PHONY: clean
clean: ## remove build/
	rm -rf --one-file-system $(BUILD)

# What the tests and the demo run is what a node would run: the installer's work, in a prefix of its own.
SYSTEM_PYTHON = /usr/bin/python3

.PHONY: prefix
prefix: packages
	@install/install.sh --prefix $(PREFIX) --no-register

.PHONY: packages rootfs
packages rootfs:
	@tests/support/prepare.sh $(ROOTFS)

.PHONY: testenv
testenv: packages
	@tests/support/testenv.sh $(TESTENV) $(CURDIR)
