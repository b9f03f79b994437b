#!/bin/bash
# Gathers in DIRECTORY what memory16.py, gpu.py and tests/gpu need on a machine without package sources: runc with its
# libraries, CRIU with its own, rewarm's C programs, its packages, and wheels of what it imports (nvidia-ml-py too).
# Usage: carry.sh DIRECTORY [PREFIX [PYTHON_VERSION]]     (PREFIX: an installed rewarm, for its CRIU; 3.12)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
if [ $# -lt 1 ] || [ $# -gt 3 ]; then
    echo "usage: carry.sh DIRECTORY [PREFIX [PYTHON_VERSION]]" >&2
    exit 2
fi
prefix=$(realpath "${2:-$repository/build/prefix}")
version=${3:-3.12}
mkdir -p "$1"
target=$(cd "$1" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rm -rf "${target:?}"/{bin,lib,criu,packages,wheels}
mkdir -p "$target"/{bin,lib,criu,packages,wheels}

runc=$(command -v runc)
cp -L "$runc" "$target/bin/runc"
# The C library stays: a machine has its own, and it is not older than what Debian builds for.
ldd "$runc" | sed -n 's/.* => \(\/[^ ]*\) .*/\1/p' | grep -v '/libc\.so' | xargs -r cp -L -t "$target/lib"

root=$prefix/criu/root
if [ -d "$root/usr" ]; then
    loader=$(find "$root/" -name 'ld-linux*.so.*' -type f | head -n 1)
    cp "$root/usr/sbin/criu" "$target/criu/criu.bin"
    cp -a "$(dirname "$loader")"/*.so* "$target/criu/"
else
    cp -L "$(command -v criu)" "$target/criu/criu.bin"
    ldd "$target/criu/criu.bin" | grep -o '/[^ ]*\.so[^ ]*' | xargs cp -L -t "$target/criu"
fi
cat >"$target/bin/criu" <<'END'
#!/bin/sh
# CRIU with the loader and the libraries that lie beside it.
directory=$(dirname "$(dirname "$(readlink -f "$0")")")/criu
exec "$directory"/ld-linux-*.so.* --library-path "$directory" "$directory/criu.bin" "$@"
END
chmod 0755 "$target/bin/criu"

make -s -C "$repository/native" BUILD="$scratch/native"
cp "$scratch/native/rewarm-runc" "$scratch/native/rewarm-guard" "$scratch/native/rewarm-device-memory.so" "$target/bin/"

# cffi builds against the limited API: one module for every Python from 3.2 on.
mkdir "$scratch/source"
cp -a "$repository"/{pyproject.toml,setup.py,README.md,shim,hooks,native} "$scratch/source/"
# An environment of its own: an installed rewarm's has neither pip nor setuptools.
/usr/bin/python3 -m venv "$scratch/venv"
python=$scratch/venv/bin/python3
"$python" -m pip --disable-pip-version-check install -q 'setuptools>=68' 'cffi>=1.15'
(cd "$scratch/source" && "$python" setup.py -q build --build-lib "$scratch/built" >"$scratch/log" 2>&1) ||
    { cat "$scratch/log" >&2; exit 1; }
cp -a "$scratch/built/." "$target/packages/"

platforms=()
for number in 28 27 24 17; do
    platforms+=(--platform "manylinux_2_${number}_x86_64")
done
"$python" -m pip --disable-pip-version-check download -q --only-binary=:all: --implementation cp \
    --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    -d "$target/wheels" blake3 cffi zstandard click pyyaml rich nvidia-ml-py
du -sh "$target" >&2
