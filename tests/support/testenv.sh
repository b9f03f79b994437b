#!/usr/bin/env bash
# Makes the virtual environment that the tests and linters run in: the libraries that rewarm needs, and the test tools.
# Usage: testenv.sh DIRECTORY REPOSITORY
set -euo pipefail
directory=$1 repository=$2
stamp=$directory/.stamp
wanted=$(sha256sum "$repository/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-32)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then exit 0; fi
rm -rf "$directory"
/usr/bin/python3 -m venv "$directory"
# The names alone: rewarm itself is tested as installed in its prefix and, by the unit tests, from the source tree.
/usr/bin/python3 - "$repository/pyproject.toml" >"$directory/requirements.txt" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print("setuptools>=68", *project["dependencies"], *project["optional-dependencies"]["test"], sep="\n")
PY
"$directory/bin/pip" install --quiet --disable-pip-version-check -r "$directory/requirements.txt"
printf '%s\n' "$wanted" >"$stamp"
printf 'testenv: %s\n' "$directory" >&2
