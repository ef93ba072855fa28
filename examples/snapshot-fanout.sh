#!/usr/bin/env bash
# Prepares one VM, creates a template from its disk, and creates COUNT VMs (default 10) from the
# template. Each VM has the file that was written to the first one, and its own host key. At the end
# everything is deleted, and the pool's usage is the same as before.
#
#   SCALEBOX_TOKEN=... examples/snapshot-fanout.sh          COUNT=3 creates fewer VMs
#
# Needs scalebox, ssh, ssh-keygen and jq, and uses the server that scalebox is configured for.
set -euo pipefail

count=${COUNT:-10}
# Number of VMs to boot at the same time. On a host that emulates guests, each needs a processor.
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
echo "the pool uses $before MiB"

made+=("$name")
create --name "$name"
# shellcheck disable=SC2016 # the guest expands it
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
		# Only its disk is needed from here on.
		scalebox vm stop "$name-$i" >/dev/null
	done
done

different=$(cut -d ' ' -f 2 "$work/keys" | sort -u | wc -l)
if ((different != count + 1)); then
	echo "only $different different host keys in $((count + 1)) VMs" >&2
	exit 1
fi
echo "$different VMs, $different host keys; the pool uses $(used_mib) MiB"

scalebox vm delete --yes "${made[@]}"
made=()
scalebox template delete --yes "$name"
# Blocks are freed after the deletion returns. A few MiB are the pool's own metadata.
for ((tries = 0; tries < 60; tries++)); do
	after=$(used_mib)
	((after > before + 16)) || break
	sleep 1
done
echo "all deleted: the pool uses $after MiB, and used $before MiB before"
((after <= before + 16))
