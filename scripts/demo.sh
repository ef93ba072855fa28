#!/usr/bin/env bash
# Runs the main paths, from nothing to SSH in a VM whose root file system has the requested size,
# and to a command in a VM of an image from a registry. Everything is in a scratch folder, which is
# removed at the end unless KEEP=1.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
# shellcheck source=scripts/scratch.sh
source scripts/scratch.sh
# shellcheck source=scripts/registry.sh
source scripts/registry.sh

daemon=$PWD/target/release/scaleboxd
cli=$PWD/target/release/scalebox
disk_gib=10

if [[ $EUID -ne 0 ]]; then
	echo "demo.sh: needs root to create a pool, a bridge and a machine; run: sudo make demo" >&2
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
		printf '\nLast lines of the daemon'\''s log:\n' >&2
		tail -n 20 "$SCRATCH/daemon.log" >&2
	fi
	if [[ ${KEEP:-0} == 1 && $status -eq 0 ]]; then
		return
	fi
	finish_step
	step "Clean up"
	registry_down
	scratch_down "$daemon"
	finish_step
	if [[ $status -eq 0 ]]; then
		printf '\nThe demo took %s s. The root file system in the guest:\n%s\ndemo: ok\n' $((SECONDS - begun)) "$df"
	fi
	exit "$status"
}

scratch_up demo 9
trap tear_down EXIT

step "Create the pool"
STORAGE_SIZE=${STORAGE_SIZE:-30G} "$daemon" --config /dev/null pool init

step "Build the Debian template (cached in ${SCALEBOX_CACHE#"$PWD"/})"
"$daemon" --config /dev/null template build debian-base --cache "$SCALEBOX_CACHE"

step "Start the daemon"
scratch_serve "$daemon"
"$cli" status

step "Create a VM with a disk of $disk_gib GiB from a template of 2 GiB"
ssh-keygen -q -t ed25519 -N '' -C demo -f "$SCRATCH/key"
"$cli" vm create debian-base --name demo --disk "$disk_gib" --key "$SCRATCH/key.pub"

step "Wait until the VM responds to SSH"
"$cli" vm wait demo --timeout 300

step "Run in the guest: df -h /"
# The known_hosts file is in the scratch folder, so the demo leaves nothing in the home directory.
in_guest() {
	ssh -F none -i "$SCRATCH/key" -p "$("$cli" vm get demo --json | sed -n 's/.*"ssh_port": *\([0-9]*\).*/\1/p')" \
		-o UserKnownHostsFile="$SCRATCH/known_hosts" -o StrictHostKeyChecking=accept-new -o BatchMode=yes \
		-o LogLevel=ERROR user@127.0.0.1 "$@"
}
df=$(in_guest df -h /)
printf '%s\n' "$df"
blocks=$(in_guest df --output=size -B1 / | tail -n 1 | tr -d ' ')
# df does not count ext4's own overhead, so it must show at least 90 % of the requested size.
if ((blocks < disk_gib * 1073741824 * 9 / 10 || blocks > disk_gib * 1073741824)); then
	echo "demo.sh: the guest's root file system has $blocks bytes, not $disk_gib GiB" >&2
	exit 1
fi
"$cli" vm list
"$cli" pool show

step "Start a registry with a password, and push an image"
registry_up "$SCRATCH/registry"
registry_image team/tools:1 >/dev/null 2>&1

step "Pull the image as a template"
printf '%s\n' "$REGISTRY_PASSWORD" | "$cli" template pull "$REGISTRY/team/tools:1" --username "$REGISTRY_USER"
registry_down

step "Run a command of the image in a VM of its own: no SSH, no key"
status=0
# shellcheck disable=SC2016 # the guest expands it
output=$(HOME=$SCRATCH/home "$cli" run "$REGISTRY/team/tools:1" -- sh -c 'echo "hello from $(uname -s)"; exit 7') || status=$?
printf '%s\nexit status: %s\n' "$output" "$status"
if [[ $output != "hello from Linux" || $status != 7 ]]; then
	echo "demo.sh: expected the output \"hello from Linux\" and the exit status 7" >&2
	exit 1
fi
finish_step

if [[ ${KEEP:-0} == 1 ]]; then
	cat <<TXT

The host is kept in $SCRATCH. To use it:
  export SCALEBOX_URL=$SCALEBOX_URL SCALEBOX_TOKEN=$SCALEBOX_TOKEN
  $cli vm ssh demo -i $SCRATCH/key
To remove it:
  kill $DAEMON_PID
  DATA_DIR=$DATA_DIR STATE_DIR=$STATE_DIR RUN_DIR=$RUN_DIR BRIDGE=$BRIDGE SUBNET=$SUBNET $daemon --config /dev/null down
  rm -rf $SCRATCH

$df
demo: ok
TXT
	disown "$DAEMON_PID"
fi
