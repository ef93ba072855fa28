#!/usr/bin/env bash
# Finds the Rust toolchain, also under sudo, which hides the one in the caller's home.
#
#   scripts/toolchain.sh path          a PATH with cargo on it
#   scripts/toolchain.sh rustup-home   the RUSTUP_HOME that goes with it (empty: rustup's own default)
set -euo pipefail

home=$HOME
if ! command -v cargo >/dev/null 2>&1 && [[ -n ${SUDO_USER:-} ]]; then
	home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
fi

case ${1:-} in
path)
	# The folders of system programs are not on every user's PATH.
	echo "$PATH:$home/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin"
	;;
rustup-home)
	if [[ -n ${RUSTUP_HOME:-} ]]; then
		echo "$RUSTUP_HOME"
	elif [[ -d $home/.rustup ]]; then
		echo "$home/.rustup"
	fi
	;;
*)
	echo "usage: $0 path|rustup-home" >&2
	exit 2
	;;
esac
