#!/usr/bin/env bash
# Checks what cargo does not: shell scripts, those that go into a guest included, and the service unit.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

git ls-files -z -- 'scripts/*.sh' 'bench/*.sh' 'examples/*.sh' .ci/run | xargs -0 shellcheck --external-sources
# What a guest runs is for its own shells: dash, and busybox in the initramfs.
git grep -lzE '^#!/bin/(busybox )?sh' -- crates/guest/files | xargs -0 shellcheck --shell=dash --exclude=SC2093

# The unit names a program that is not installed here: any other stands in for it.
unit=$(mktemp -d)
trap 'rm -rf -- "$unit"' EXIT
sed 's#^ExecStart=[^ ]*#ExecStart=/bin/true#' packaging/scaleboxd.service >"$unit/scaleboxd.service"
if ! said=$(systemd-analyze verify "$unit/scaleboxd.service" 2>&1) || [[ -n $said ]]; then
	echo "packaging/scaleboxd.service: $said" >&2
	exit 1
fi
echo "scripts ok, unit ok"
