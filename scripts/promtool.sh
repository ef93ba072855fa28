#!/usr/bin/env bash
# Prints the folder of promtool, with which tests check the metrics; prints nothing if it is not
# available. In Debian it is a part of the package of the Prometheus server. Installing that would
# start the server, so only the program is extracted, into target/.
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
	# apt's own user cannot write to this folder; apt reports that, and downloads as root.
	fetch() { (cd "$scratch" && apt-get download -qq prometheus >/dev/null 2>&1); }
	fetch || { apt-get update -qq >/dev/null 2>&1 && fetch; } || exit 0
	dpkg-deb --extract "$scratch"/prometheus_*.deb "$scratch/out" || exit 0
	mkdir -p "$tools/usr/bin"
	mv "$scratch/out/usr/bin/promtool" "$tools/usr/bin/promtool" || exit 0
fi
echo "$tools/usr/bin"
