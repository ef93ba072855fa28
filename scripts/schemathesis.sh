#!/usr/bin/env bash
# Tests a running scaleboxd against the description that it serves, with schemathesis (https://schemathesis.readthedocs.io):
# requests of the right form are taken, those of a wrong form refused, nothing is a 5xx, and answers are as they are described.
#
# The host is one for tests: VMs and templates are made and deleted on it. It has a template debian-base and no kernel, and
# MAX_DISK_SIZE_GIB is small. SCALEBOX_URL and SCALEBOX_TOKEN name it; SECONDS_AT_MOST (120) bounds the run; SCALEBOX_TEST_SEED chooses
# another one. More arguments go to schemathesis.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
: "${SCALEBOX_URL:?the address of a scaleboxd for tests}" "${SCALEBOX_TOKEN:?its token}"

venv=${SCHEMATHESIS_VENV:-target/schemathesis}
wanted=scripts/schemathesis/requirements.txt
# The list of what is installed goes in last: half an installation is made anew.
if ! cmp -s "$wanted" "$venv/requirements.txt"; then
	rm -rf -- "$venv"
	python3 -m venv "$venv"
	"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --requirement "$wanted"
	cp -- "$wanted" "$venv/requirements.txt"
fi

# Without a filter the path of the document itself would be left out.
export SCHEMATHESIS_HOOKS=hooks PYTHONPATH=scripts/schemathesis PYTHONDONTWRITEBYTECODE=1
exec "$venv/bin/schemathesis" --config-file scripts/schemathesis/config.toml run "$SCALEBOX_URL/openapi.json" \
	--include-path-regex "^/" --header "Authorization: Bearer $SCALEBOX_TOKEN" \
	--max-time "${SECONDS_AT_MOST:-120}" --seed "${SCALEBOX_TEST_SEED:-1}" "$@"
