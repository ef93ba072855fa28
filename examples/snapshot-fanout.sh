#!/usr/bin/env bash
# One VM is set up by hand, its disk becomes a template, and COUNT VMs (default 10) are made from it. Each shows the file that was written
# and a host key of its own. Then everything is deleted, and the pool holds what it held before.
#
#   SCALEBOX_TOKEN=... examples/snapshot-fanout.sh          COUNT=3 for fewer
#
# Needs scalebox, ssh, ssh-keygen and jq. Takes the server from where scalebox takes it.
set -euo pipefail

count=${COUNT:-10}
# Booted at once: on a host that emulates its guests each takes a processor.
at_once=${AT_ONCE:-2}
timeout=${TIMEOUT:-300}
name=fanout-$$
work=$(mktemp -d)

made=()
clean_up() {
	((${#made[@]} == 0)) || scalebox vm delete --yes "${made[@]}" || true
	scalebox template delete --yes "$name" 2>/dev/null || true
	rm -rf -- "$work"
}
trap clean_up EXIT

used_mib() { scalebox pool show --json | jq '.used_bytes / 1048576 | floor'; }
in_vm() {
	local vm=$1
	shift
	scalebox vm ssh "$vm" -i "$work/key" -- "$@"
}
create() { scalebox vm create "$@" --key "$work/key.pub" --wait --timeout "$timeout"; }

ssh-keygen -q -t ed25519 -N '' -f "$work/key"
before=$(used_mib)
echo "the pool holds $before MiB"

made+=("$name")
create --name "$name"
# shellcheck disable=SC2016 # the guest is to expand it
in_vm "$name" 'echo "written in $(hostname)" > note'
in_vm "$name" 'cat /etc/ssh/ssh_host_ed25519_key.pub' >>"$work/keys"
scalebox vm snapshot "$name" "$name"
scalebox vm stop "$name"

for ((first = 1; first <= count; first += at_once)); do
	batch=()
	for ((i = first; i < first + at_once && i <= count; i++)); do
		made+=("$name-$i")
		create "$name" --name "$name-$i" >/dev/null &
		batch+=("$!")
	done
	for pid in "${batch[@]}"; do wait "$pid"; done
	for ((i = first; i < first + at_once && i <= count; i++)); do
		key=$(in_vm "$name-$i" 'cat /etc/ssh/ssh_host_ed25519_key.pub')
		echo "$key" >>"$work/keys"
		echo "$name-$i: $(in_vm "$name-$i" cat note); ${key:0:80}"
		# Only its disk is of interest from here on.
		scalebox vm stop "$name-$i" >/dev/null
	done
done

different=$(cut -d ' ' -f 2 "$work/keys" | sort -u | wc -l)
if ((different != count + 1)); then
	echo "$different host keys in $((count + 1)) VMs" >&2
	exit 1
fi
echo "$different VMs, $different host keys; the pool holds $(used_mib) MiB"

scalebox vm delete --yes "${made[@]}"
made=()
scalebox template delete --yes "$name"
# Blocks are given back behind the answer. A few MiB are the pool's own.
for ((tries = 0; tries < 60; tries++)); do
	after=$(used_mib)
	((after > before + 16)) || break
	sleep 1
done
echo "all deleted: the pool holds $after MiB, and held $before MiB"
((after <= before + 16))
