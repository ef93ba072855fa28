#!/usr/bin/env bash
# Creates a disk with the original system's commands: clones it, grows it, mounts it, copies a key.
# Flushes nothing.
#
#   bench/seed.sh TEMPLATE.ext4 DISK.ext4 SIZE_GIB MOUNT_POINT KEY_FILE
set -euo pipefail
template=$1 disk=$2 size=$3 mount_point=$4 key=$5

cp --reflink=auto -- "$template" "$disk"
truncate -s "${size}G" "$disk"
e2fsck -f -y "$disk" >/dev/null 2>&1 || true
resize2fs "$disk" >/dev/null 2>&1
mount -o loop "$disk" "$mount_point"
trap 'umount -- "$mount_point"' EXIT
mkdir -p -- "$mount_point/home/user/.ssh"
cp -- "$key" "$mount_point/home/user/.ssh/authorized_keys"
