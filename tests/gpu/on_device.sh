#!/bin/bash
# Runs tests/gpu on a machine with a GPU and without package sources, as root.
# Usage: on_device.sh CARRIED OUT [pytest arguments]     (CARRIED: what tests/bench/carry.sh gathered)
# OUT/gpu-tests.json has what became of every test, written anew after each; OUT/gpu-tests.log all that was printed.
set -uo pipefail
if [ $# -lt 2 ]; then
    echo "usage: on_device.sh CARRIED OUT [pytest arguments]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$2"
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
"${PYTHON:-python3}" -u "$here/run.py" "$@" 2>&1 | tee "$2/gpu-tests.log"
