#!/usr/bin/env bash
# The main job, from nothing to SSH in a VM whose root file system has the size that was asked for. Everything lies in a scratch place of its
# own and is torn down at the end, unless KEEP=1.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
# shellcheck source=scripts/scratch.sh
source scripts/scratch.sh

daemon=$PWD/target/release/scaleboxd
cli=$PWD/target/release/scalebox
disk_gib=10

if [[ $EUID -ne 0 ]]; then
	echo "the demo makes a pool, a bridge and a machine: run it as root (sudo make demo)" >&2
	exit 1
fi

begun=$SECONDS
step_begun=
df=
step() {
	finish_step
	step_begun=$SECONDS
	printf '\n== %s\n' "$*"
}
finish_step() {
	[[ -z $step_begun ]] || printf '   (%s s)\n' $((SECONDS - step_begun))
	step_begun=
}
tear_down() {
	local status=$?
	if [[ $status -ne 0 && -s $SCRATCH/daemon.log ]]; then
		printf '\nthe last lines of the daemon'\''s log:\n' >&2
		tail -n 20 "$SCRATCH/daemon.log" >&2
	fi
	if [[ ${KEEP:-0} == 1 && $status -eq 0 ]]; then
		return
	fi
	finish_step
	step "Tear everything down"
	scratch_down "$daemon"
	finish_step
	if [[ $status -eq 0 ]]; then
		printf '\nAll of it took %s s. What the guest said of its root file system:\n%s\ndemo: ok\n' $((SECONDS - begun)) "$df"
	fi
	exit "$status"
}

scratch_up demo 9
trap tear_down EXIT

step "Create the pool"
STORAGE_SIZE=${STORAGE_SIZE:-30G} "$daemon" --config /dev/null pool init

step "Build the Debian template (kept in ${SCALEBOX_CACHE#"$PWD"/} for the next time)"
"$daemon" --config /dev/null template build debian-base --cache "$SCALEBOX_CACHE"

step "Start the daemon"
scratch_serve "$daemon"
"$cli" status

step "Create a VM with a disk of $disk_gib GiB on a template of 2 GiB"
ssh-keygen -q -t ed25519 -N '' -C demo -f "$SCRATCH/key"
"$cli" vm create debian-base --name demo --disk "$disk_gib" --key "$SCRATCH/key.pub"

step "Wait until it answers SSH"
"$cli" vm wait demo --timeout 300

step "Ask the guest itself: df -h /"
# The known_hosts file goes with the scratch folder: the demo leaves nothing in a home.
in_guest() {
	ssh -F none -i "$SCRATCH/key" -p "$("$cli" vm get demo --json | sed -n 's/.*"ssh_port": *\([0-9]*\).*/\1/p')" \
		-o UserKnownHostsFile="$SCRATCH/known_hosts" -o StrictHostKeyChecking=accept-new -o BatchMode=yes \
		-o LogLevel=ERROR user@127.0.0.1 "$@"
}
df=$(in_guest df -h /)
printf '%s\n' "$df"
blocks=$(in_guest df --output=size -B1 / | tail -n 1 | tr -d ' ')
# ext4 keeps a part for itself: at least 90 % of what was asked for shows as the file system's size.
if ((blocks < disk_gib * 1073741824 * 9 / 10 || blocks > disk_gib * 1073741824)); then
	echo "the guest's root is $blocks bytes large, not $disk_gib GiB" >&2
	exit 1
fi
"$cli" vm list
"$cli" pool show
finish_step

if [[ ${KEEP:-0} == 1 ]]; then
	cat <<TXT

Kept, in $SCRATCH. To go on with it:
  export SCALEBOX_URL=$SCALEBOX_URL SCALEBOX_TOKEN=$SCALEBOX_TOKEN
  $cli vm ssh demo -i $SCRATCH/key
To take it away:
  kill $DAEMON_PID
  DATA_DIR=$DATA_DIR STATE_DIR=$STATE_DIR RUN_DIR=$RUN_DIR BRIDGE=$BRIDGE SUBNET=$SUBNET $daemon --config /dev/null down
  rm -rf $SCRATCH

$df
demo: ok
TXT
	disown "$DAEMON_PID"
fi
