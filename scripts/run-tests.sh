#!/usr/bin/env bash
# Runs every test, and then looks for what tests may have left on the host: a leftover is a failure.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

if [[ $EUID -ne 0 ]]; then
	echo "the tests make pools, bridges and machines: run them as root (sudo make test)" >&2
	exit 1
fi

# What is there of ours: mounts, loop devices, taps and bridges, nft tables, processes.
inventory() {
	grep -E ' btrfs | /tmp/\.tmp' /proc/self/mountinfo | awk '{ print "mount " $5 }' || true
	losetup -n -O NAME,BACK-FILE | awk '{ print "loop " $0 }'
	ip -o link show | awk -F': ' '{ print $2 }' | sed 's/@.*//' | grep -E '^sb' | sed 's/^/link /' || true
	nft list tables | grep -i 'sb' | sed 's/^/nft /' || true
	ip netns list | sed 's/^/netns /'
	pgrep -a 'qemu-system|scaleboxd' | awk '{ print "process " $1 " " $2 }' || true
}

before=$(mktemp)
after=$(mktemp)
trap 'rm -f -- "$before" "$after"' EXIT
inventory | sort >"$before"

status=0
if cargo nextest --version >/dev/null 2>&1; then
	cargo nextest run --locked --workspace --no-fail-fast "$@" || status=$?
	# nextest runs no examples of the documentation.
	cargo test --locked --workspace --doc --quiet || status=$?
else
	cargo test --locked --workspace --no-fail-fast "$@" || status=$?
fi

inventory | sort >"$after"
if left=$(comm -13 "$before" "$after") && [[ -n $left ]]; then
	echo "the tests left this on the host:" >&2
	echo "$left" >&2
	status=1
fi
exit "$status"
