#!/usr/bin/env bash
# Runs all tests, then removes their leftovers from the host, also after an interruption. The run
# fails if there were any.
#
# Arguments are passed to the test runner, such as a part of a test's name.
set -uo pipefail
cd -- "$(dirname -- "$0")/.." || exit 1

if [[ $EUID -ne 0 ]]; then
	echo "run-tests.sh: needs root to create pools, bridges and machines; run: sudo make test" >&2
	exit 1
fi

promtool=$(scripts/promtool.sh)
PATH=$PATH${promtool:+:$promtool}

# All scratch folders of tests are in this folder, which identifies the files and processes of
# tests. The path is short because the length of socket paths is limited.
TMPDIR=$(mktemp -d /tmp/sbt.XXXXXX)
export TMPDIR

# Outside their folders, tests use names of their own; see the tests' support files.
links() { ip -o link show | sed -n 's/^[0-9]*: \(sbtest[0-9]*\)[@:].*/\1/p'; }
taps() { ip -o link show | sed -n 's/^[0-9]*: \(sb[0-9a-f]\{12\}\)[@:].* master sbtest[0-9]* .*/\1/p'; }
tables() { nft list tables | sed -n 's/^table \([a-z0-9]* scalebox_sbtest[0-9]*\)$/\1/p'; }
mounts() { awk -v dir="$TMPDIR/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | tac; }
loops() { losetup -n -O NAME,BACK-FILE | awk -v dir="$TMPDIR/" 'index($2, dir) == 1 { print $1 }'; }
# Control groups without a process belong to machines that have ended. Groups that existed before
# the run are not ours.
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
	# The arguments of a jailed process contain no path, but its standard output is a pipe in a
	# scratch folder.
	for pid in $(pgrep -f -- '^/firecracker --id vm-'); do
		[[ $(readlink "/proc/$pid/fd/1") != "$TMPDIR"/* ]] || echo "$pid"
	done
}

left=0
remove() {
	local kind=$1 what=$2
	shift 2
	echo "run-tests.sh: a test left a $kind: $what" >&2
	left=1
	"$@" || echo "run-tests.sh: cannot remove this $kind: $what" >&2
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

# Tests build a daemon with fault points, at which it can be killed; a release has none.
features=scaleboxd/fault-points
status=0
if cargo nextest --version >/dev/null 2>&1; then
	cargo nextest run --locked --workspace --features "$features" "$@" || status=$?
	# nextest does not run documentation tests.
	[[ $# -gt 0 ]] || cargo test --locked --workspace --features "$features" --doc --quiet || status=$?
else
	cargo test --locked --workspace --features "$features" --no-fail-fast "$@" || status=$?
fi

clean_up
if [[ $left -ne 0 && $status -eq 0 ]]; then
	echo "run-tests.sh: all tests passed, but some left something on the host (see above)" >&2
	status=1
fi
exit "$status"
