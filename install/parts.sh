#!/usr/bin/env bash
# Makes, on a machine with a network and a compiler, all that install.sh --from needs on nodes that have neither: wheels for
# every Python that a node may have, the C programs, and CRIU with its libraries. Nodes need the same architecture, and a
# glibc that is no older than this machine's.
# Usage: parts.sh DIRECTORY      (which must not exist; Debian 12 or newer, with gcc, make, python3-dev and python3-venv)
set -euo pipefail
umask 022
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"

versions=(3.11 3.12 3.13 3.14)
python=/usr/bin/python3

dependencies() {
    "$python" -I -c 'import sys, tomllib
for line in tomllib.load(sys.stdin.buffer)["project"]["dependencies"]:
    print(line)' <"$work/source/pyproject.toml"
}

# rewarm's own wheel is one for all versions: its compiled module keeps to Python's stable ABI.
collect_wheels() {
    local pip=("$work/venv/bin/python3" -I -m pip --disable-pip-version-check) platforms=() wanted name version
    mapfile -t wanted < <(dependencies)
    for name in manylinux_2_28 manylinux_2_17 manylinux2014; do
        platforms+=(--platform "${name}_$(uname -m)")
    done
    quietly "parts: making a virtual environment" "$python" -I -m venv "$work/venv"
    quietly "parts: building rewarm's wheel" "${pip[@]}" wheel --no-deps -w "$parts/wheels" "$work/source"
    quietly "parts: downloading pip" "${pip[@]}" download --no-deps --only-binary :all: -d "$parts/wheels" pip
    for version in "${versions[@]}"; do
        quietly "parts: downloading wheels for Python $version" "${pip[@]}" download --only-binary :all: \
            --implementation cp --python-version "$version" "${platforms[@]}" -d "$parts/wheels" "${wanted[@]}"
    done
    compgen -G "$parts/wheels/rewarm-*-abi3-*.whl" >/dev/null || die "parts: rewarm's wheel is not for the stable ABI"
}

main() {
    local target=$1 name
    [[ ! -e $target ]] || die "parts: $target is there already; give a directory that is not"
    work=$(mktemp -d)
    parts=$target.new.$$
    trap 'rm -rf "$work" "$parts"' EXIT
    mkdir -p "$parts"/{wheels,programs}
    stage_source "$(dirname "$here")" "$work/source"
    quietly "parts: building the C programs" make -C "$work/source/native" BUILD="$work/build"
    for name in rewarm-runc rewarm-guard rewarm-device-memory.so; do
        install_file "$work/build/$name" "$parts/programs/$name" 0755
    done
    collect_wheels
    bash "$here/provide_criu.sh" --pack "$parts/criu" "$python" || exit 1
    uname -m >"$parts/complete"
    mv -T "$parts" "$target"
    say "parts: $target, $(du -sh "$target" | cut -f 1)"
}

[[ $# -eq 1 && $1 != -* ]] || die "usage: parts.sh DIRECTORY"
main "$1"
