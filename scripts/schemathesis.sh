#!/usr/bin/env bash
# Tests a running scaleboxd against its OpenAPI document, with schemathesis
# (https://schemathesis.readthedocs.io): valid requests are accepted, invalid ones are rejected,
# nothing returns a 5xx, and responses match the document.
#
# Use a host for tests only: VMs and templates are created and deleted on it. It needs a template
# debian-base, no kernel, and a small MAX_DISK_SIZE_GIB. SCALEBOX_URL and SCALEBOX_TOKEN name it;
# MAX_SECONDS (120) limits the duration; SCALEBOX_TEST_SEED selects another sequence of
# requests. Further arguments are passed to schemathesis.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."
: "${SCALEBOX_URL:?the address of a scaleboxd for tests}" "${SCALEBOX_TOKEN:?its token}"

venv=${SCHEMATHESIS_VENV:-target/schemathesis}
wanted=scripts/schemathesis/requirements.txt
# The list of packages is copied last, so that an incomplete installation is repeated.
if ! cmp -s "$wanted" "$venv/requirements.txt"; then
	rm -rf -- "$venv"
	python3 -m venv "$venv"
	"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --requirement "$wanted"
	cp -- "$wanted" "$venv/requirements.txt"
fi

# Without a filter, schemathesis would skip the path of the document itself.
export SCHEMATHESIS_HOOKS=hooks PYTHONPATH=scripts/schemathesis PYTHONDONTWRITEBYTECODE=1
exec "$venv/bin/schemathesis" --config-file scripts/schemathesis/config.toml run "$SCALEBOX_URL/openapi.json" \
	--include-path-regex "^/" --header "Authorization: Bearer $SCALEBOX_TOKEN" \
	--max-time "${MAX_SECONDS:-120}" --seed "${SCALEBOX_TEST_SEED:-1}" "$@"
