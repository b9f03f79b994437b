#!/usr/bin/env bash
# Makes the virtual environment that the tests and linters run in: the libraries that rewarm needs, the test tools, and
# rewarm itself for its compiled module (its Python sources are taken from the tree: `pythonpath` in pyproject.toml).
# Usage: testenv.sh DIRECTORY REPOSITORY
set -euo pipefail
directory=$1 repository=$2
stamp=$directory/.stamp
cd "$repository"
wanted=$(find pyproject.toml setup.py native/rewarm_native tests/support/testenv.sh -type f \
    ! -name '*.so' ! -name '*.o' ! -name '_native.c' ! -name '_cuda.py' ! -path '*/__pycache__/*' -print0 |
    sort -z | xargs -0 sha256sum | sha256sum | cut -c1-32)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then exit 0; fi
rm -rf "$directory"
/usr/bin/python3 -m venv "$directory"
# A copy, so that building leaves nothing in the checkout.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tar --exclude=__pycache__ --exclude='*.so' --exclude='*.o' --exclude=_native.c --exclude=_cuda.py \
    -c pyproject.toml setup.py README.md shim hooks native | tar -x -C "$copy"
"$directory/bin/pip" install --quiet --disable-pip-version-check "${copy}[test]" "setuptools>=68"
printf '%s\n' "$wanted" >"$stamp"
printf 'testenv: %s\n' "$directory" >&2
