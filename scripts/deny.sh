#!/usr/bin/env bash
# Checks licences, duplicates, sources and advisories of all dependencies with cargo-deny, and
# installs it if it is missing.
#
# The advisory database is a git repository. If it cannot be reached, the script skips that check
# and reports it.
set -euo pipefail

command -v cargo-deny >/dev/null || cargo install --locked --quiet cargo-deny@0.20.2
cargo deny --locked check bans licenses sources

if output=$(timeout 60 cargo deny --locked check advisories 2>&1); then
	echo "advisories ok"
elif grep -qiE 'failed to fetch|failed to clone|could not resolve|unable to connect|network|timed out' <<<"$output" || [[ -z $output ]]; then
	echo "deny.sh: cannot reach the advisory database; advisories were NOT checked" >&2
else
	echo "$output" >&2
	exit 1
fi
