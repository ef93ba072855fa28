#!/usr/bin/env bash
# Prints the folder of promtool, which checks the metrics in the tests; nothing where it cannot be had. Debian has it in the package of the Prometheus
# server, which would be installed with it and started: so the program alone is taken out of the package, into target/.
set -uo pipefail
cd -- "$(dirname -- "$0")/.." || exit 1

if found=$(command -v promtool); then
	dirname -- "$found"
	exit
fi
tools=$PWD/target/tools
if [[ ! -x $tools/usr/bin/promtool ]]; then
	scratch=$(mktemp -d)
	trap 'rm -rf -- "$scratch"' EXIT
	# Made where apt's own user cannot write: it says so, and root's fetch works all the same.
	fetch() { (cd "$scratch" && apt-get download -qq prometheus >/dev/null 2>&1); }
	fetch || { apt-get update -qq >/dev/null 2>&1 && fetch; } || exit 0
	dpkg-deb --extract "$scratch"/prometheus_*.deb "$scratch/out" || exit 0
	mkdir -p "$tools/usr/bin"
	mv "$scratch/out/usr/bin/promtool" "$tools/usr/bin/promtool" || exit 0
fi
echo "$tools/usr/bin"
