#!/usr/bin/env bash
# Tests Scalebox on a whole Debian server in an emulated machine with systemd, control groups,
# Landlock and KVM. The cases install Scalebox as documented, then restart, kill, misconfigure,
# reboot, upgrade and remove it.
#
#   scripts/test-host.sh               runs all cases in order
#   scripts/test-host.sh short         runs the cases of CI
#   scripts/test-host.sh reboot port   runs these cases, after an installation
#   scripts/test-host.sh --list        lists all cases, with their descriptions
#
# Run it with `make test-host`, which first builds the programs and the template. It needs root (for
# the server's root disk) and about 6 GiB in target/. KEEP=1 keeps the server running at the end,
# and prints how to log in.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
# shellcheck source=scripts/test-host/root.sh
source scripts/test-host/root.sh
# shellcheck source=scripts/test-host/server.sh
source scripts/test-host/server.sh
# shellcheck source=scripts/test-host/cases.sh
source scripts/test-host/cases.sh

: "${SCALEBOX_CACHE:=$PWD/target/template-cache}"
readonly artifacts=$PWD/target/test-host

heading() { printf '== %s\n' "$*"; }

# Lists the cases in the order of the file. The comment above a case describes it.
all_cases() { sed -n 's/^case_\([a-z_]*\)() {$/\1/p' scripts/test-host/cases.sh; }
list_cases() { sed -n '/^# /{h;b};/^case_/{s/^case_\([a-z_]*\)() {$/\1/;G;s/\n# /\t/;p}' scripts/test-host/cases.sh | expand -t 20; }

choose_cases() {
	local name
	case ${1:-} in
	'') all_cases ;;
	short) printf '%s\n' "${short_cases[@]}" ;;
	*)
		[[ $1 == install ]] || echo install
		for name in "$@"; do
			all_cases | grep -qxF -- "$name" || {
				echo "test-host.sh: unknown case $name; scripts/test-host.sh --list lists all cases" >&2
				return 1
			}
			echo "$name"
		done
		;;
	esac
}

status_of_run=0
table=()

# Runs a case once and sets case_status. It must not run inside a condition, because bash then
# ignores `set -e`.
try_case() {
	: >"$WORK/note"
	set +e
	(
		set -e
		"case_$1"
	) >"$WORK/log" 2>&1
	case_status=$?
	set -e
}

# Maximum number of repetitions of a case in which the server's own kernel crashed. The table has
# the number.
readonly breaks_allowed=2

run_case() {
	local name=$1 begun=$SECONDS outcome=ok note breaks=0
	printf 'case: %s ...' "$name"
	try_case "$name"
	while ((case_status != 0 && breaks < breaks_allowed)) && { server_broke || ! server_answers; }; do
		breaks=$((breaks + 1))
		printf " the server's kernel failed: repeating ..."
		cp -- "$WORK/console" "$artifacts/server-console-$breaks.log"
		server_cut
		restore_server >"$WORK/log" 2>&1 || break
		try_case "$name"
	done
	((case_status == 0)) || outcome=FAILED
	printf ' %s (%s s)\n' "$outcome" $((SECONDS - begun))
	((breaks == 0)) || note "repeated, because the server's own kernel failed: $breaks"
	note=$(paste -sd' ' "$WORK/note")
	table+=("$(printf '%-18s %-7s %5s s   %s' "$name" "$outcome" $((SECONDS - begun)) "$note")")
	[[ $outcome == ok ]] || show_failure
}

# Restores the server after a failed case.
restore_server() {
	server_runs || server_start
	on <<-'SH'
		sed -i '/^MAX_DISK_SIZE_GIB=lots$/d; s/^API_PORT=22$/API_PORT=8080/' /etc/scaleboxd/config
		[[ ! -e /var/lib/elsewhere.img ]] || mv /var/lib/elsewhere.img /var/lib/scalebox.img
		mountpoint -q /var/lib/scalebox || mount /var/lib/scalebox
		nft list table inet filter >/dev/null 2>&1 && nft delete table inet filter
		systemctl restart scaleboxd
		eventually 60 scalebox status >/dev/null
		delete_all
	SH
}

show_failure() {
	status_of_run=1
	echo "---- output of the case ----"
	tail -n 60 "$WORK/log"
	echo "---- last lines of the journal ----"
	timeout 60 ssh "${ssh_options[@]}" root@127.0.0.1 journalctl --no-pager --lines 60 -t scaleboxd -t systemd -t kernel 2>/dev/null || tail -n 40 "$WORK/console"
}

# Adds a remark to the table: a figure, or why something was skipped.
note() { printf '%s\n' "$*" >>"$WORK/note"; }

clean_up() {
	local status=$?
	trap - EXIT INT TERM
	if [[ ${KEEP:-0} == 1 && -n ${WORK:-} ]] && server_runs; then
		echo "The server is running. To log in: ssh ${ssh_options[*]} root@127.0.0.1"
		echo "To remove it: kill $(server_pid) && rm -r $WORK"
		exit "$status"
	fi
	if [[ -n ${WORK:-} ]]; then
		server_cut
		rm -rf -- "$WORK"
	fi
	[[ -z ${SCRATCH:-} ]] || rm -rf -- "$SCRATCH"
	scripts/toolchain.sh give-back
	exit "$status"
}

main() {
	if [[ ${1:-} == --list ]]; then
		list_cases
		return
	fi
	local cases begun=$SECONDS name
	mapfile -t cases < <(choose_cases "$@")
	[[ ${#cases[@]} -gt 0 ]] || return 2
	[[ $EUID -eq 0 ]] || {
		echo "test-host.sh: needs root to build the server's root disk; run: sudo make test-host" >&2
		return 1
	}
	trap clean_up EXIT
	trap 'exit 130' INT TERM
	build_root "$artifacts"
	WORK=$(mktemp -d "$artifacts/run.XXXXXX")
	heading "Start the server"
	server_prepare
	server_ssh
	server_start
	echo "   ($((SECONDS - begun)) s)"
	for name in "${cases[@]}"; do
		run_case "$name"
		if [[ $status_of_run -ne 0 ]]; then
			# The other cases need an installation.
			[[ $name != install ]] || break
			restore_server >"$WORK/log" 2>&1 || {
				cat "$WORK/log"
				break
			}
		fi
	done
	printf '\n%s\n\nThe run took %s s.\n' "$(printf '%s\n' "${table[@]}")" $((SECONDS - begun))
	return "$status_of_run"
}

main "$@"
