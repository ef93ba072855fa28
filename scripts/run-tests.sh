#!/usr/bin/env bash
# Runs every test, and then looks for what tests may have left on the host. Whatever is found is removed, also when the run was interrupted, and a
# run that left something has failed.
#
# Arguments go to the test runner, such as a part of a test's name.
set -uo pipefail
cd -- "$(dirname -- "$0")/.." || exit 1

if [[ $EUID -ne 0 ]]; then
	echo "the tests make pools, bridges and machines: run them as root (sudo make test)" >&2
	exit 1
fi

promtool=$(scripts/promtool.sh)
PATH=$PATH${promtool:+:$promtool}

# Every test's scratch folder lies in here, so that what belongs to them can be told from all else. Short: sockets' paths are limited.
TMPDIR=$(mktemp -d /tmp/sbt.XXXXXX)
export TMPDIR

# What the tests make outside their folders has names of their own; see the tests' support files.
links() { ip -o link show | sed -n 's/^[0-9]*: \(sbtest[0-9]*\)[@:].*/\1/p'; }
taps() { ip -o link show | sed -n 's/^[0-9]*: \(sb[0-9a-f]\{12\}\)[@:].* master sbtest[0-9]* .*/\1/p'; }
tables() { nft list tables | sed -n 's/^table \([a-z0-9]* scalebox_sbtest[0-9]*\)$/\1/p'; }
mounts() { awk -v dir="$TMPDIR/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac; }
loops() { losetup -n -O NAME,BACK-FILE | awk -v dir="$TMPDIR/" 'index($2, dir) == 1 { print $1 }'; }
# Control groups of machines that are gone: those of machines that run hold a process. What was there before belongs to somebody else.
all_groups() { find /sys/fs/cgroup -type d -path '*/scalebox/vm-*' 2>/dev/null; }
groups_before=$(all_groups)
groups() {
	local group
	all_groups | grep -vxF -e "${groups_before:-none}" | while read -r group; do
		[[ -n $(cat "$group/cgroup.procs" 2>/dev/null) ]] || echo "$group"
	done
}
processes() {
	local pid
	for pid in $(pgrep -f -- "$TMPDIR/"); do
		[[ $pid == "$$" ]] || echo "$pid"
	done
	# A jailed process names no folder; the pipe of its console lies in one.
	for pid in $(pgrep -f -- '^/firecracker --id vm-'); do
		[[ $(readlink "/proc/$pid/fd/1") != "$TMPDIR"/* ]] || echo "$pid"
	done
}

left=0
remove() {
	local kind=$1 what=$2
	shift 2
	echo "left by a test: $kind $what" >&2
	left=1
	"$@" || echo "and it could not be removed" >&2
}
clean_up() {
	local it
	for it in $(processes); do remove process "$it: $(tr '\0' ' ' <"/proc/$it/cmdline" 2>/dev/null | cut -c1-80)" kill -KILL "$it"; done
	for it in $(taps); do remove tap "$it" ip link delete "$it"; done
	for it in $(links); do remove bridge "$it" ip link delete "$it"; done
	while read -r it; do
		# shellcheck disable=SC2086 # family and name are two words
		[[ -z $it ]] || remove table "$it" nft delete table $it
	done < <(tables)
	while read -r it; do [[ -z $it ]] || remove mount "$it" umount -l "$it"; done < <(mounts)
	for it in $(groups); do remove "control group" "$it" rmdir "$it"; done
	for it in $(loops); do remove loop "$it" losetup -d "$it"; done
	rm -rf -- "$TMPDIR"
	scripts/toolchain.sh give-back
}
trap 'clean_up; exit 130' INT TERM

# The daemon of the tests ends itself where the crash test tells it to; what is released cannot.
features=scaleboxd/fault-points
status=0
if cargo nextest --version >/dev/null 2>&1; then
	cargo nextest run --locked --workspace --features "$features" "$@" || status=$?
	# nextest does not run the examples of the documentation.
	[[ $# -gt 0 ]] || cargo test --locked --workspace --features "$features" --doc --quiet || status=$?
else
	cargo test --locked --workspace --features "$features" --no-fail-fast "$@" || status=$?
fi

clean_up
if [[ $left -ne 0 && $status -eq 0 ]]; then
	echo "all tests passed, but something was left behind" >&2
	status=1
fi
exit "$status"
