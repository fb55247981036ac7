#!/usr/bin/env bash
# Known vulnerabilities, licences and sources of the dependencies. What cannot be checked here is
# said in one line, and is no failure.
set -u
cd "$(dirname "$0")/.."
status=0

unchecked() {
	echo "audit: not checked: $1" >&2
}

if command -v cargo-deny >/dev/null; then
	checks="bans licenses sources"
	if timeout 120 cargo deny --log-level off fetch db >/dev/null 2>&1; then
		checks="advisories $checks"
	else
		unchecked "known vulnerabilities of the crates: RustSec's database cannot be fetched"
	fi
	# shellcheck disable=SC2086 # one word a check
	cargo deny --log-level error check $checks || status=1
else
	unchecked "the crates: type: cargo install --locked cargo-deny"
fi

if ! said=$(timeout 300 pip-audit --progress-spinner off --skip-editable 2>&1); then
	if grep -qE 'Found [0-9]+ known vulnerabilit' <<<"$said"; then
		echo "$said"
		status=1
	else
		unchecked "known vulnerabilities of the Python packages: $(tail -n 1 <<<"$said")"
	fi
fi
exit $status
