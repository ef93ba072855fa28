#!/usr/bin/env bash
# Fills SCALEBOX_CACHE with the finished Debian template and kernel for the tests, unless they
# exist. With `debian-dev` it adds the template of that name, in a subfolder; with `cloud-disk` the
# disk image of cloud-disk.sh.
#
#   scripts/template-cache.sh path/to/scaleboxd [debian-dev|cloud-disk]
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
case ${2:-} in
debian-dev) "$daemon" --config /dev/null template build debian-dev --cache "$SCALEBOX_CACHE/debian-dev" ;;
cloud-disk) scripts/cloud-disk.sh "$SCALEBOX_CACHE" ;;
esac
