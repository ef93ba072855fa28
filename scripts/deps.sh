#!/usr/bin/env bash
# Installs the Debian packages that Scalebox, its build and its tests need; what is there is left as it is.
set -euo pipefail

packages=(
	# to build: a C compiler and linker for SQLite and the TLS library
	gcc libc6-dev make pkg-config
	# at run time
	btrfs-progs e2fsprogs util-linux mount nftables iproute2 qemu-system-x86
	# to build the Debian template
	mmdebstrap debian-archive-keyring cpio zstd kmod
	# the tests, the demo and the benchmark
	openssh-client xfsprogs dosfstools mtools procps curl shellcheck strace systemd fio iptables python3-venv
)

# Fails on a machine without apt with a sentence rather than with "command not found".
command -v apt-get >/dev/null || {
	echo "deps.sh: this script knows Debian and Ubuntu; install by hand: ${packages[*]}" >&2
	exit 1
}

missing=()
for package in "${packages[@]}"; do
	dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $EUID -ne 0 ]]; then
	echo "deps.sh: these packages are missing, and only root can install them: ${missing[*]}" >&2
	echo "deps.sh: run: sudo apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "Installing ${missing[*]}..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
