#!/usr/bin/env bash
# Fills SCALEBOX_CACHE with the finished Debian template and kernel for the tests, unless they
# exist; with `all`, also with the template debian-dev, in a subfolder, and with the disk image of
# cloud-disk.sh.
#
#   scripts/template-cache.sh path/to/scaleboxd [all]
set -euo pipefail
daemon=$(realpath -- "$1")
cd -- "$(dirname -- "$0")/.."
# shellcheck source=scripts/scratch.sh
source scripts/scratch.sh

: "${SCALEBOX_CACHE:?set it to the folder for the template}"
mkdir -p -- "$SCALEBOX_CACHE"
scratch_up template 8
trap 'scratch_down "$daemon"' EXIT
STORAGE_SIZE=20G "$daemon" --config /dev/null pool init >/dev/null
"$daemon" --config /dev/null template build debian-base --cache "$SCALEBOX_CACHE"
if [[ ${2:-} == all ]]; then
	"$daemon" --config /dev/null template build debian-dev --cache "$SCALEBOX_CACHE/debian-dev"
	scripts/cloud-disk.sh "$SCALEBOX_CACHE"
fi
