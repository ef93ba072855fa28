# shellcheck shell=bash
# Sourced by scripts/test-host.sh: builds the root disk of the server, and keeps it in target/ until
# its ingredients change.
#
#   build_root FOLDER    sets ROOT to a subfolder with disk.img (sparse), vmlinuz and initrd.img
#
# During the build, SCRATCH names a folder that the caller removes after an interruption.

# Packages of a Debian server, in addition to those that Scalebox needs.
server_packages=(
	systemd-sysv dbus udev libpam-systemd openssh-server openssh-client curl iproute2 ca-certificates sudo procps
	linux-image-amd64 initramfs-tools
)
# Large enough for a pool of 80 % of the free space.
readonly server_disk=46G

# Prints a digest of the disk's ingredients. Package versions are not part of it: remove the folder
# to get newer packages.
root_key() {
	{
		printf '%s\n' "${server_packages[@]}" "$server_disk"
		scripts/deps.sh --list run build
		cat scripts/test-host/root.sh
	} | sha256sum | cut -c1-16
}

build_root() {
	local folder=$1 key begun=$SECONDS scratch
	key=$(root_key)
	ROOT=$folder/root-$key
	[[ ! -e $ROOT/disk.img ]] || return 0
	heading "Build the server's root disk"
	mkdir -p -- "$folder"
	rm -rf -- "$folder"/root-*
	SCRATCH=$(mktemp -d "$folder/root-$key.XXXXXX")
	scratch=$SCRATCH
	# The call is not inside a condition, where bash ignores `set -e`.
	local status=0
	set +e
	(
		set -e
		install_debian "$scratch/root"
		configure_server "$scratch/root"
	) >"$scratch/log" 2>&1
	status=$?
	set -e
	if [[ $status -ne 0 ]]; then
		tail -n 30 "$scratch/log" >&2
		return 1
	fi
	cp -L "$scratch/root/vmlinuz" "$scratch/vmlinuz"
	cp -L "$scratch/root/initrd.img" "$scratch/initrd.img"
	truncate -s "$server_disk" "$scratch/disk.img"
	mke2fs -q -t ext4 -E lazy_itable_init=1 -d "$scratch/root" "$scratch/disk.img"
	rm -rf -- "$scratch/root" "$scratch/log"
	mv -- "$scratch" "$ROOT"
	SCRATCH=
	echo "   ($((SECONDS - begun)) s)"
}

install_debian() {
	local root=$1 packages
	packages=$(printf '%s\n' "${server_packages[@]}" "$(scripts/deps.sh --list run build)" | sort -u | paste -sd,)
	local arguments=(
		--mode=root --variant=minbase --format=directory
		--aptopt='Apt::Install-Recommends "false"'
		--dpkgopt=force-unsafe-io
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*'
		--include="$packages" bookworm "$root"
	)
	# Use the archive of this host if it runs Debian.
	[[ ! -e /etc/apt/sources.list.d/debian.sources ]] || arguments+=(/etc/apt/sources.list.d/debian.sources)
	# mmdebstrap mounts /proc, /sys and /dev in the new root; the mount namespace removes them.
	unshare --mount -- mmdebstrap "${arguments[@]}"
}

# Configures the server. Keys, programs and the source tree of a run are on a second disk (see
# server.sh).
configure_server() {
	local root=$1
	echo server >"$root/etc/hostname"
	printf '127.0.0.1 localhost server\n' >"$root/etc/hosts"
	cat >"$root/etc/fstab" <<-TXT
		/dev/vda / ext4 rw,discard 0 1
		LABEL=payload /payload ext4 rw,nofail,x-systemd.device-timeout=30 0 0
	TXT
	mkdir "$root/payload"
	cat >"$root/etc/systemd/network/10-server.network" <<-TXT
		[Match]
		Name=eth0
		[Network]
		DHCP=yes
	TXT
	# The resolver of QEMU's user network.
	echo 'nameserver 10.0.2.3' >"$root/etc/resolv.conf"
	cat >"$root/etc/ssh/sshd_config.d/test-host.conf" <<-TXT
		AuthorizedKeysFile /payload/authorized_keys
		PermitRootLogin prohibit-password
		UseDNS no
	TXT
	systemctl --root "$root" --quiet enable systemd-networkd ssh
	systemctl --root "$root" --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer
	# A user with sudo.
	chroot "$root" useradd --create-home --shell /bin/bash --groups sudo ada
	echo 'ada ALL=(ALL:ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/ada"
}
