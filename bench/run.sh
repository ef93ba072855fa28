#!/usr/bin/env bash
# Sets up a scratch folder, runs the benchmark, and cleans up, also after a failure or an
# interruption.
#
#   make bench                      a full run, at most ten minutes
#   make bench QUICK=1              a small run
#   make bench ROWS="guest pull"    some groups of rows: disks, writes, guest, pull
#
# The pool has a device of its own, a loop device over a sparse 4 TiB file, so that 32 disks of 100
# GiB are admitted at once on any host. The disks are clones; less than 5 GB are actually written.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
# shellcheck source=scripts/scratch.sh
source scripts/scratch.sh
# shellcheck source=scripts/registry.sh
source scripts/registry.sh

scaleboxd=$PWD/target/release/scaleboxd
[[ $EUID -eq 0 ]] || { echo "run.sh: needs root; run: sudo make bench" >&2; exit 1; }

SCALEBOXD=$scaleboxd
pool_loop='' ext4_loop=''

# loop FILE: attaches a loop device with direct I/O and prints it.
loop() {
	losetup --find --show --direct-io=on "$1"
}

down() {
	local pid
	trap '' INT TERM
	if pid=$(cat "$SCRATCH/daemon.pid" 2>/dev/null) && [[ $(readlink "/proc/$pid/exe") == "$SCALEBOXD" ]]; then
		kill "$pid" 2>/dev/null || true
		for ((tries = 0; tries < 600; tries++)); do
			kill -0 "$pid" 2>/dev/null || break
			sleep 0.1
		done
	fi
	registry_down
	# An interrupted seed.sh may have left a file system mounted.
	findmnt --raw --noheadings --output TARGET | grep -F -- "$SCRATCH/mnt/" | while read -r mounted; do umount -- "$mounted"; done || true
	mountpoint -q "$BENCH_EXT4" && umount -- "$BENCH_EXT4"
	mountpoint -q "$DATA_DIR" && { LOG_LEVEL=warn "$scaleboxd" --config /dev/null down >/dev/null || umount -- "$DATA_DIR"; }
	[[ -n $ext4_loop ]] && losetup --detach "$ext4_loop"
	[[ -n $pool_loop ]] && losetup --detach "$pool_loop"
	rm -rf --one-file-system -- "$SCRATCH"
}

scratch_up bench 7
export SUBNET=172.29.0.0/16 PORT_MIN=10000 PORT_MAX=19999 OVERCOMMIT_RATIO=100 LOG_LEVEL=info
export SCRATCH SCALEBOXD BENCH_EXT4=$SCRATCH/ext4 QUICK=${QUICK:-} ROWS=${ROWS:-}
trap down EXIT
trap 'exit 130' INT TERM

echo "Setting up the benchmark in $SCRATCH..." >&2
truncate --size 4T "$SCRATCH/pool.disk"
pool_loop=$(loop "$SCRATCH/pool.disk")
export POOL_DEVICE=$pool_loop
unset POOL_IMAGE
mkdir -p "$BENCH_EXT4"
truncate --size 4G "$SCRATCH/ext4.disk"
ext4_loop=$(loop "$SCRATCH/ext4.disk")
mke2fs -q -t ext4 "$ext4_loop"
mount -o noatime "$ext4_loop" "$BENCH_EXT4"
ssh-keygen -q -t ed25519 -N '' -C bench -f "$SCRATCH/key"
"$scaleboxd" --config /dev/null pool init >/dev/null
"$scaleboxd" --config /dev/null template build debian-base --cache "$SCALEBOX_CACHE" >/dev/null
registry_up "$SCRATCH/registry" anonymous
export REGISTRY

target/release/scalebox-bench
