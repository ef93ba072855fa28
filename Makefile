# What people run. Each target sets up what it needs by itself; see scripts/deps.sh.
#
#   sudo make demo     from a bare machine to SSH in a VM, in a scratch place that is torn down again (KEEP=1 keeps it)
#   sudo make test     every test, with real pools, a real kernel and a real guest
#   sudo make test-faults   every system call of every operation fails once (docs/crash-safety.md)
#   sudo make bench    how long a disk takes, beside the original's way and the limit (docs/benchmarks.md); QUICK=1 for a small run
#   sudo make test-host  an operator's day on a whole Debian server in an emulated machine (scripts/test-host.sh); CASES="install reboot" for a part
#   make lint          fmt, clippy, cargo deny
#   sudo make install  this host becomes a Scalebox host (scripts/install.sh)
#
# Under sudo, the programs are built by the person who called it; what `make test` builds as root is theirs afterwards.

SHELL := /bin/bash
export PATH := $(shell scripts/toolchain.sh path)
export RUSTUP_HOME := $(shell scripts/toolchain.sh rustup-home)

# Finished parts of the Debian template: built once, then taken from here.
test test-host demo bench: export SCALEBOX_CACHE ?= $(CURDIR)/target/template-cache

# Tests end the daemon at each of its steps; what is released cannot do that. scripts/run-tests.sh names it too.
TEST_FEATURES := scaleboxd/fault-points

CARGO := scripts/toolchain.sh run cargo

.PHONY: all build release deps test test-faults test-host demo bench lint fmt install clean

all: build

deps:
	scripts/deps.sh

build:
	$(CARGO) build --locked --workspace

release:
	$(CARGO) build --locked --release --bin scaleboxd --bin scalebox

test: deps
	cargo build --locked --workspace --all-targets --features $(TEST_FEATURES)
	scripts/template-cache.sh target/debug/scaleboxd
	scripts/run-tests.sh

# Every system call of every operation fails once: an hour or so. `make test` lets the first few of each kind fail.
test-faults: deps
	$(CARGO) build --locked --workspace --all-targets --features $(TEST_FEATURES)
	SCALEBOX_ALL_FAULTS=1 scripts/run-tests.sh --profile faults --filterset 'binary(fault_walk_outside)' --no-capture

test-host: deps
	cargo build --locked --workspace --all-targets --features $(TEST_FEATURES)
	scripts/template-cache.sh target/debug/scaleboxd
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
