#!/usr/bin/env bash
# Checks shell scripts, including those of guests, and the systemd units.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

git ls-files -z -- 'scripts/*.sh' scripts/test-host/cargo 'bench/*.sh' 'examples/*.sh' .ci/run | xargs -0 shellcheck --external-sources
# Scripts of guests run in dash.
git grep -lzE '^#!/bin/sh' -- crates/images/files | xargs -0 shellcheck --shell=dash --exclude=SC2093

# The units run a program that is not installed here, so it is replaced by another. They refer to
# each other, so they are checked together.
units=$(mktemp -d)
trap 'rm -rf -- "$units"' EXIT
for unit in packaging/*.service; do
	sed 's#^\(ExecStart\|ExecStop\)=/usr/local/bin/scaleboxd .*#\1=/bin/true#' "$unit" >"$units/${unit##*/}"
done
if ! output=$(systemd-analyze verify "$units"/*.service 2>&1) || [[ -n $output ]]; then
	echo "packaging: $output" >&2
	exit 1
fi
echo "scripts ok, units ok"
