#!/usr/bin/env bash
# Sets up what the benchmark needs in a scratch folder, runs it, and takes everything down again, also when it fails or is interrupted.
#
#   make bench            a full run, ten minutes at most
#   make bench QUICK=1    a small one
#
# The pool lies on a device of its own, which is a loop device over a sparse 4 TiB file: 32 disks of 100 GiB are admitted at once on a host
# that has not that much. The disks are clones, and what is really written is less than 5 GB.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
# shellcheck source=scripts/scratch.sh
source scripts/scratch.sh

scaleboxd=$PWD/target/release/scaleboxd
[[ $EUID -eq 0 ]] || { echo "run it as root (sudo make bench)" >&2; exit 1; }

SCALEBOXD=$scaleboxd
pool_loop='' ext4_loop=''

# A loop device with direct I/O.
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
	# What an interrupted seed.sh left mounted.
	findmnt --raw --noheadings --output TARGET | grep -F -- "$SCRATCH/mnt/" | while read -r mounted; do umount -- "$mounted"; done || true
	mountpoint -q "$BENCH_EXT4" && umount -- "$BENCH_EXT4"
	mountpoint -q "$DATA_DIR" && { LOG_LEVEL=warn "$scaleboxd" --config /dev/null down >/dev/null || umount -- "$DATA_DIR"; }
	[[ -n $ext4_loop ]] && losetup --detach "$ext4_loop"
	[[ -n $pool_loop ]] && losetup --detach "$pool_loop"
	rm -rf --one-file-system -- "$SCRATCH"
}

scratch_up bench 7
export SUBNET=172.29.0.0/16 PORT_MIN=10000 PORT_MAX=19999 OVERCOMMIT_RATIO=100 LOG_LEVEL=info
export SCRATCH SCALEBOXD BENCH_EXT4=$SCRATCH/ext4 QUICK=${QUICK:-}
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
"$scaleboxd" --config /dev/null pool init >/dev/null
"$scaleboxd" --config /dev/null template build debian-base --cache "$SCALEBOX_CACHE" >/dev/null

target/release/scalebox-bench
