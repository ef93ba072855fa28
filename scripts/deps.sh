#!/usr/bin/env bash
# Installs the Debian packages that Scalebox needs. Installed packages are not changed.
#
#   scripts/deps.sh                  installs all groups
#   scripts/deps.sh run build        installs these groups
#   scripts/deps.sh --list run       lists the packages of a group
#
# Groups: `build` to compile the programs, `run` for a host, `test` for the tests, the demo and the
# benchmark.
set -euo pipefail

# SQLite and the TLS library need a C compiler and linker.
build=(gcc libc6-dev make pkg-config)
run=(
	btrfs-progs e2fsprogs util-linux mount nftables iproute2 qemu-system-x86
	# to build the Debian template
	mmdebstrap debian-archive-keyring cpio zstd kmod
	# to import disk images
	qemu-utils fdisk
)
test=(openssh-client xfsprogs dosfstools mtools procps curl shellcheck strace systemd fio iptables python3-venv
	busybox-static docker-registry skopeo umoci tmux)

list=false
if [[ ${1:-} == --list ]]; then
	list=true
	shift
fi
[[ $# -gt 0 ]] || set -- build run test

packages=()
for group in "$@"; do
	case $group in
	build) packages+=("${build[@]}") ;;
	run) packages+=("${run[@]}") ;;
	test) packages+=("${test[@]}") ;;
	*)
		echo "deps.sh: unknown group $group; use build, run or test" >&2
		exit 2
		;;
	esac
done
if $list; then
	printf '%s\n' "${packages[@]}"
	exit
fi

command -v apt-get >/dev/null || {
	echo "deps.sh: supports only Debian and Ubuntu; install these packages by hand: ${packages[*]}" >&2
	exit 1
}

missing=()
for package in "${packages[@]}"; do
	dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $EUID -ne 0 ]]; then
	echo "deps.sh: needs root to install missing packages; run: sudo apt-get install ${missing[*]}" >&2
	exit 1
fi
echo "Installing ${missing[*]}..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
