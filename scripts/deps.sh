#!/usr/bin/env bash
# Installs the Debian packages that Scalebox needs; packages that are installed already stay as they are.
#
#   scripts/deps.sh                  all of them
#   scripts/deps.sh run build        those of these groups
#   scripts/deps.sh --list run       prints them instead
#
# Groups: `build` compiles the programs, `run` is what a host needs, `test` is for the tests, the demo and the benchmark.
set -euo pipefail

# A C compiler and linker for SQLite and the TLS library.
build=(gcc libc6-dev make pkg-config)
run=(
	btrfs-progs e2fsprogs util-linux mount nftables iproute2 qemu-system-x86
	# to build the Debian template
	mmdebstrap debian-archive-keyring cpio zstd kmod
)
test=(openssh-client xfsprogs dosfstools mtools procps curl shellcheck strace systemd fio iptables python3-venv)

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
		echo "deps.sh: there is no group $group: write build, run or test" >&2
		exit 2
		;;
	esac
done
if $list; then
	printf '%s\n' "${packages[@]}"
	exit
fi

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
