#!/usr/bin/env bash
# From POST /vms to an SSH banner: five VMs one after another on a warm host, each deleted before the next; prints the median. The first of them warms
# the caches and is not counted.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
# shellcheck source=scripts/scratch.sh
source scripts/scratch.sh

daemon=$PWD/target/release/scaleboxd
cli=$PWD/target/release/scalebox
runs=${RUNS:-5}

[[ $EUID -eq 0 ]] || { echo "run it as root (sudo make bench)" >&2; exit 1; }

scratch_up bench 7
trap 'scratch_down "$daemon"' EXIT
STORAGE_SIZE=30G "$daemon" --config /dev/null pool init >/dev/null
"$daemon" --config /dev/null template build debian-base --cache "$SCALEBOX_CACHE" >/dev/null
scratch_serve "$daemon"
ssh-keygen -q -t ed25519 -N '' -f "$SCRATCH/key"

now_ms() { date +%s%3N; }
printf '%-6s %14s %14s\n' run 'POST /vms' 'POST → SSH'
times=()
for ((run = 0; run <= runs; run++)); do
	begun=$(now_ms)
	"$cli" vm create debian-base --name "bench-$run" --disk 10 --key "$SCRATCH/key.pub" --json >/dev/null
	created=$(now_ms)
	"$cli" vm wait "bench-$run" --timeout 300 --json >/dev/null
	answered=$(now_ms)
	"$cli" vm delete "bench-$run" --yes >/dev/null
	label=$run
	if ((run == 0)); then label=warm; else times+=($((answered - begun))); fi
	printf '%-6s %11s ms %11s ms\n' "$label" $((created - begun)) $((answered - begun))
done
median=$(printf '%s\n' "${times[@]}" | sort -n | sed -n "$(((runs + 1) / 2))p")
printf 'median of %s: %s.%01d s from POST /vms to SSH\n' "$runs" $((median / 1000)) $((median % 1000 / 100))
