#!/usr/bin/env bash
# Makes a disk image for the tests that resembles Debian's cloud images: qcow2 with a GPT, a system
# partition and a root with cloud-init, netplan and sshd, but without a kernel. Keeps it until this
# script changes.
#
#   scripts/cloud-disk.sh FOLDER     writes FOLDER/cloud-disk.qcow2
set -euo pipefail
folder=$(realpath -- "$1")
script=$(realpath -- "$0")

packages=(
	systemd-sysv dbus udev iproute2 cloud-init cloud-guest-utils netplan.io systemd-resolved openssh-server
	sudo e2fsprogs kmod
)
# The partitions of Debian's images, which their fstab names.
readonly root_partition=2c9b7d0e-5a5f-4c0e-9d0c-7d3f1b6f2a01
readonly system_partition=2c9b7d0e-5a5f-4c0e-9d0c-7d3f1b6f2a0f

install_debian() {
	local root=$1 list
	list=$(printf '%s\n' "${packages[@]}" | paste -sd,)
	local arguments=(
		--quiet --mode=root --variant=minbase --format=directory
		--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr
		--aptopt='Apt::Install-Recommends "false"'
		--dpkgopt=force-unsafe-io
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*'
		--include="$list" bookworm "$root"
	)
	# Use the archive of this host if it runs Debian.
	[[ ! -e /etc/apt/sources.list.d/debian.sources ]] || arguments+=(/etc/apt/sources.list.d/debian.sources)
	# mmdebstrap mounts /proc, /sys and /dev in the new root; the mount namespace removes them.
	unshare --mount -- mmdebstrap "${arguments[@]}"
}

# Removes what belongs to the build, as the images of Debian do. cloud-init does the rest at the
# first boot.
configure() {
	local root=$1
	cat >"$root/etc/fstab" <<-TXT
		PARTUUID=$root_partition / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1
		PARTUUID=$system_partition /boot/efi vfat defaults 0 0
	TXT
	echo localhost >"$root/etc/hostname"
	# Otherwise cloud-init would generate another locale.
	echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
	rm -f "$root"/etc/ssh/ssh_host_*
	ln -sfn ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
	echo uninitialized >"$root/etc/machine-id"
}

# Writes root partition and partition table into a raw disk.
write_disk() {
	local root=$1 disk=$2 start=264192 sectors=4194304
	truncate -s $((sectors * 512)) "$disk.root"
	mke2fs -q -t ext4 -d "$root" "$disk.root"
	truncate -s $(((start + sectors + 2048) * 512)) "$disk"
	sfdisk --quiet "$disk" <<-TXT
		label: gpt
		start=$start, size=$sectors, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, uuid=$root_partition
		start=2048, size=6144, type=21686148-6449-6E6F-744E-656564454649
		start=8192, size=253952, type=uefi, uuid=$system_partition
	TXT
	dd if="$disk.root" of="$disk" bs=512 seek="$start" conv=sparse,notrunc status=none
}

# The file next to the image tells which script made it.
made_by=$(sha256sum <"$script")
if [[ -e $folder/cloud-disk.qcow2 && $(cat "$folder/cloud-disk.made-by" 2>/dev/null) == "$made_by" ]]; then
	exit
fi
begun=$SECONDS
mkdir -p -- "$folder"
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/scalebox-cloud-disk.XXXXXX")
trap 'rm -rf -- "$scratch"' EXIT
if ! install_debian "$scratch/root" >"$scratch/log" 2>&1; then
	tail -n 30 "$scratch/log" >&2
	exit 1
fi
configure "$scratch/root"
write_disk "$scratch/root" "$scratch/disk"
rm -f -- "$folder/cloud-disk.made-by"
qemu-img convert -O qcow2 "$scratch/disk" "$folder/cloud-disk.qcow2.new"
mv -- "$folder/cloud-disk.qcow2.new" "$folder/cloud-disk.qcow2"
echo "$made_by" >"$folder/cloud-disk.made-by"
echo "The cloud disk is ready ($((SECONDS - begun)) s)."
