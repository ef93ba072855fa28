#!/usr/bin/env bash
# Finds and runs the Rust toolchain of the person who called, also under sudo, which hides what is in their home.
#
#   scripts/toolchain.sh path          a PATH with that toolchain first
#   scripts/toolchain.sh rustup-home   the RUSTUP_HOME that belongs to it (empty: rustup's own default)
#   scripts/toolchain.sh check         fails, and says how to get one, where there is no toolchain or one that is too old
#   scripts/toolchain.sh run CMD...    runs a command as the caller; target/ belongs to them afterwards
#   scripts/toolchain.sh give-back     gives the caller what a build as root left in target/
#
# The answers depend on the caller alone, not on the PATH that a caller of this script may have changed already: make 4.4 and
# later pass the variables of a Makefile to its `$(shell …)`, earlier ones do not.
set -euo pipefail

tree=$(cd -- "$(dirname -- "$0")/.." && pwd)

# Under sudo, the account that called it; else empty.
caller=
if [[ $EUID -eq 0 && -n ${SUDO_USER:-} && $SUDO_USER != root ]] && getent passwd "$SUDO_USER" >/dev/null; then
	caller=$SUDO_USER
fi
home=$HOME
[[ -z $caller ]] || home=$(getent passwd "$caller" | cut -d: -f6)

# The folders of system programs are not on every user's PATH.
path="$home/.cargo/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"

rustup_home() {
	if [[ -z $caller && -n ${RUSTUP_HOME:-} ]]; then
		echo "$RUSTUP_HOME"
	elif [[ -d $home/.rustup ]]; then
		echo "$home/.rustup"
	fi
}

# A tree that the caller cannot write to is built by root.
as_caller() {
	if [[ -z $caller ]] || ! runuser -u "$caller" -- test -w "$tree"; then
		PATH=$path "$@"
		return
	fi
	runuser -u "$caller" -- env HOME="$home" USER="$caller" LOGNAME="$caller" PATH="$path" "$@"
}

give_back() {
	[[ -n $caller && -d $tree/target && $(stat -c %u "$tree") != 0 ]] || return 0
	find "$tree/target" -xdev -uid 0 -exec chown --no-dereference "$caller": {} +
}

check() {
	local needed found
	needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$tree/Cargo.toml")
	local advice="install it with rustup (https://rustup.rs):
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh
or set BIN_DIR to a folder with scaleboxd and scalebox that were built elsewhere"
	if ! found=$(as_caller cargo --version 2>&1); then
		[[ -z $found ]] || found=": $found"
		printf 'no Rust toolchain works for %s%s\nRust %s or later is needed; %s\n' "${caller:-$(id -un)}" "$found" "$needed" "$advice" >&2
		return 1
	fi
	found=$(cut -d' ' -f2 <<<"$found")
	if [[ $(printf '%s\n' "$needed" "${found%%-*}" | sort -V | head -n 1) != "$needed" ]]; then
		printf 'Rust %s is too old (%s)\nRust %s or later is needed; %s\n' "$found" "$(as_caller sh -c 'command -v cargo')" "$needed" "$advice" >&2
		return 1
	fi
}

case ${1:-} in
path) echo "$path" ;;
rustup-home) rustup_home ;;
check) check ;;
run)
	shift
	give_back
	as_caller "$@"
	;;
give-back) give_back ;;
*)
	echo "usage: $0 path|rustup-home|check|run CMD...|give-back" >&2
	exit 2
	;;
esac
