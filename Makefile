# Each target installs the packages it needs; see scripts/deps.sh.
#
#   sudo make demo         from nothing to SSH in a VM, in a scratch folder (KEEP=1 keeps it)
#   sudo make test         all tests, with real pools, a real kernel and real guests
#   sudo make test-faults  every system call of every operation fails once (docs/crash-safety.md)
#   sudo make test-cloud   a Debian cloud image with cloud-init boots, grows and is cloned
#   sudo make fuzz         random bytes from a guest's agent, for FUZZ_SECONDS (60)
#   sudo make bench        measures disks, guests and pulls (docs/benchmarks.md); QUICK=1 for a
#                          small run, ROWS="guest pull" for some groups of rows
#   sudo make test-host    tests on a whole emulated server (scripts/test-host.sh);
#                          CASES="install reboot" selects cases
#   make lint              formatting, clippy, shell scripts, spelling, dependencies
#   sudo make install      turns this host into a Scalebox host (scripts/install.sh)
#
# Under sudo, the user who called it builds the programs, and owns the files that `make test` builds
# as root.

SHELL := /bin/bash
export PATH := $(shell scripts/toolchain.sh path)
export RUSTUP_HOME := $(shell scripts/toolchain.sh rustup-home)

# The cache of the templates for tests, which are built once.
test-programs test test-cloud fuzz test-host demo bench: export SCALEBOX_CACHE ?= $(CURDIR)/target/template-cache

# Tests kill the daemon at its fault points; a release has none. The same in scripts/run-tests.sh.
TEST_FEATURES := scaleboxd/fault-points

CARGO := scripts/toolchain.sh run cargo

.PHONY: all build release deps test test-programs test-cloud test-faults fuzz test-host demo bench lint fmt install clean

all: build

deps:
	scripts/deps.sh

build:
	$(CARGO) build --locked --workspace

release:
	$(CARGO) build --locked --release --bin scaleboxd --bin scalebox

test: test-programs
	scripts/template-cache.sh target/debug/scaleboxd debian-dev
	scripts/run-tests.sh

# The programs and the Debian template that the tests run.
test-programs: deps
	cargo build --locked --workspace --all-targets --features $(TEST_FEATURES)
	scripts/template-cache.sh target/debug/scaleboxd

# Takes about an hour. `make test` covers only the first few calls of each kind.
test-faults: deps
	$(CARGO) build --locked --workspace --all-targets --features $(TEST_FEATURES)
	SCALEBOX_ALL_FAULTS=1 scripts/run-tests.sh --profile faults --filterset 'binary(fault_walk_outside)' --no-capture

# Takes several minutes, most of them in cloud-init, so `make test` leaves it out.
test-cloud: test-programs
	scripts/template-cache.sh target/debug/scaleboxd cloud-disk
	scripts/run-tests.sh --ignore-default-filter --filterset 'binary(guests_cloud)'

# With the features of the other tests, so that nothing is built again.
fuzz: FUZZ_SECONDS ?= 60
fuzz: test-programs
	SCALEBOX_FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO) test --locked --workspace --features $(TEST_FEATURES) --test fuzz_agent -- --nocapture

test-host: test-programs
	scripts/test-host.sh $(CASES)

demo: deps release
	scripts/demo.sh

bench: deps release
	$(CARGO) build --locked --release --package scalebox-bench
	bench/run.sh

fmt:
	cargo fmt --all

lint: deps
	cargo fmt --all --check
	scripts/lint-scripts.sh
	scripts/lint-text.sh
	cargo clippy --locked --workspace --all-targets --features $(TEST_FEATURES) -- -D warnings
	scripts/deny.sh

install:
	scripts/install.sh

clean:
	cargo clean
