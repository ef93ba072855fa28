#!/usr/bin/env bash
# Checks what cargo does not: shell scripts, those that go into a guest included, and the service unit.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

git ls-files -z -- 'scripts/*.sh' scripts/test-host/cargo 'bench/*.sh' 'examples/*.sh' .ci/run | xargs -0 shellcheck --external-sources
# What a guest runs is for its own shells: dash, and busybox in the initramfs.
git grep -lzE '^#!/bin/(busybox )?sh' -- crates/guest/files | xargs -0 shellcheck --shell=dash --exclude=SC2093

# The units name a program that is not installed here: any other stands in for it. They name each other, so they are checked together.
units=$(mktemp -d)
trap 'rm -rf -- "$units"' EXIT
for unit in packaging/*.service; do
	sed 's#^\(ExecStart\|ExecStop\)=/usr/local/bin/scaleboxd .*#\1=/bin/true#' "$unit" >"$units/${unit##*/}"
done
if ! said=$(systemd-analyze verify "$units"/*.service 2>&1) || [[ -n $said ]]; then
	echo "packaging: $said" >&2
	exit 1
fi
echo "scripts ok, units ok"
