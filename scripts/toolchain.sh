#!/usr/bin/env bash
# Finds and runs the Rust toolchain of the calling user; under sudo, of the user who called sudo.
#
#   scripts/toolchain.sh path          prints a PATH with that toolchain first
#   scripts/toolchain.sh rustup-home   prints its RUSTUP_HOME (empty: rustup's default)
#   scripts/toolchain.sh check         fails if there is no toolchain or it is too old
#   scripts/toolchain.sh run CMD...    runs a command as that user, who then owns target/
#   scripts/toolchain.sh give-back     changes the owner of root's files in target/ to that user
#
# The results must not depend on a PATH that a Makefile has already changed: make 4.4 and later pass
# exported variables to `$(shell …)`, earlier versions do not.
set -euo pipefail

tree=$(cd -- "$(dirname -- "$0")/.." && pwd)

# The user who called sudo; empty without sudo.
caller=
if [[ $EUID -eq 0 && -n ${SUDO_USER:-} && $SUDO_USER != root ]] && getent passwd "$SUDO_USER" >/dev/null; then
	caller=$SUDO_USER
fi
home=$HOME
[[ -z $caller ]] || home=$(getent passwd "$caller" | cut -d: -f6)

# Not every user has the folders of system programs in their PATH.
path="$home/.cargo/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"

rustup_home() {
	if [[ -z $caller && -n ${RUSTUP_HOME:-} ]]; then
		echo "$RUSTUP_HOME"
	elif [[ -d $home/.rustup ]]; then
		echo "$home/.rustup"
	fi
}

# Runs a command as the caller, or as root if the caller cannot write to the tree.
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
or set BIN_DIR to a folder with the programs scaleboxd and scalebox"
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
