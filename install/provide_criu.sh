#!/usr/bin/env bash
# Provides a CRIU that this kernel can do with (4.1.1; 4.2 from Linux 6.16 on): the system's if it is new enough, else the
# package of the distribution's stable release, or of the next one if that is too old, unpacked with its libraries into
# PREFIX/criu, where nothing else on the machine sees it.
# Usage: provide_criu.sh PREFIX PYTHON [PARTS]     PARTS: what parts.sh made, to be taken instead of a mirror's packages
#        provide_criu.sh --pack DIRECTORY PYTHON   unpacks the packages there, for any kernel, and runs nothing
#
# The packages come from the mirrors in the machine's own apt configuration, through an apt that has its own state
# (private_apt.sh), whose empty list of installed packages brings the whole library closure.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"
# shellcheck source-path=SCRIPTDIR source=private_apt.sh
. "$here/private_apt.sh"

# suites_to_try: what may carry a new enough package, best first. `components` and `origin` go with it.
describe_distribution() {
    local os_release=/etc/os-release
    # shellcheck source=/dev/null
    . "$os_release"
    codename=${VERSION_CODENAME:-}
    case " ${ID:-} " in
    # The codenames are for mirrors that carry no aliases.
    *" debian "*) origin=Debian components="main" suites=(stable testing trixie forky) ;;
    # An Ubuntu mirror has no `stable`: this release, the first LTS that has it, the one in the making.
    *" ubuntu "*) origin=Ubuntu components="main universe" suites=("$codename" resolute devel) ;;
    *) die "criu: ${PRETTY_NAME:-this system} is neither Debian nor Ubuntu; install CRIU >= $minimum by hand" ;;
    esac
    [[ -n $codename ]] || codename=sid
}

# find_packages: sets $suite to the first of $suites that has it, and what private_apt sets. Needs $work.
find_packages() {
    chmod 0755 "$work" # apt downloads as the user _apt
    for suite in "${suites[@]}"; do
        if private_apt criu "$suite" "$minimum"; then return; fi
    done
    grep -hE '^(E|W|Err)' "$work"/*/update.log | sort -u | head -n 10 >&2 || true
    die "criu: none of ${suites[*]} offers CRIU >= $minimum at this machine's $origin mirrors;" \
        "see the lines above (a missing key: update the package ${origin,,}-archive-keyring or ubuntu-keyring)"
}

# unpack DIRECTORY: into it the packages that private_apt's suite offers, each checked by apt.
unpack() {
    local deb
    quietly "criu: downloading the packages" \
        apt-get -c "$conf" install -y --download-only --no-install-recommends criu
    for deb in "$(dirname "$conf")"/cache/archives/*.deb; do
        dpkg-deb -x "$deb" "$1"
    done
}

# write_wrapper ROOT: a program that runs what was unpacked there.
write_wrapper() {
    local root=$1 loader libraries
    # The program's own loader with its own libraries: the system's libc is older than what this CRIU was built for.
    loader=$(find "$root" -name 'ld-linux*.so.*' -type f | head -n 1)
    [[ -n $loader && -x $root/usr/sbin/criu ]] || die "criu: the unpacked packages hold no loader or no usr/sbin/criu"
    libraries=$(dirname "$loader")
    cat >"$root/criu" <<EOF
#!/bin/sh
# CRIU with its own loader and libraries, unpacked by rewarm's install.
exec '$loader' --library-path '$libraries' '$root/usr/sbin/criu' "\$@"
EOF
    chmod 0755 "$root/criu"
}

good_enough() {
    local version
    version=$(criu_version "$1")
    [[ -n $version ]] && at_least "$version" "$minimum"
}

# criu check needs root and says which kernel feature is missing.
check_kernel() {
    local answer
    answer=$("$1" check 2>&1) || die "criu: $1 check: this kernel cannot restore containers: $answer"
}

main() {
    local prefix=$1 parts=${3:-} suite system old
    python=$2
    minimum=$(criu_minimum)
    system=$(command -v criu || true)
    if [[ -n $system ]] && good_enough "$system"; then
        check_kernel "$system"
        say "criu: the system's, $(criu_version "$system") ($system)"
        return
    fi
    if good_enough "$prefix/criu/bin/criu"; then
        check_kernel "$prefix/criu/bin/criu"
        say "criu: $(criu_version "$prefix/criu/bin/criu") is there ($prefix/criu/bin/criu)"
        return
    fi
    [[ -z $system ]] || say "criu: the system's, $(criu_version "$system"), is too old for Linux $(uname -r)"
    work=$(mktemp -d)
    unfinished=$work
    trap 'rm -rf "$work" "$unfinished"' EXIT
    if [[ -n $parts ]]; then
        suite=$parts
    else
        say "criu: taking the distribution's package from the machine's own mirror"
        describe_distribution
        find_packages
    fi
    mkdir -p "$prefix/criu"
    root=$(mktemp -d "$prefix/criu/root.XXXXXX")
    chmod 0755 "$root"
    unfinished=$root
    if [[ -n $parts ]]; then
        cp -a --no-preserve=ownership "$parts/criu/." "$root"
    else
        unpack "$root"
    fi
    write_wrapper "$root"
    good_enough "$root/criu" || die "criu: the unpacked program does not run or is older than $minimum"
    check_kernel "$root/criu"
    install_file "$root/criu" "$prefix/criu/bin/criu" 0755
    install_link "$(basename "$root")" "$prefix/criu/root"
    unfinished=$work
    for old in "$prefix"/criu/root.*; do
        [[ $old == "$root" ]] || rm -rf "$old"
    done
    say "criu: $(criu_version "$prefix/criu/bin/criu") from $suite, in $prefix/criu"
}

# pack DIRECTORY PYTHON: for whatever kernel it will meet, so the newest that criu_minimum asks of any.
pack() {
    local suite
    python=$2
    minimum=4.2
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    describe_distribution
    find_packages
    mkdir -p "$1"
    unpack "$1"
}

case ${1:-} in
--pack)
    [[ $# -eq 3 ]] || die "usage: provide_criu.sh --pack DIRECTORY PYTHON"
    pack "$2" "$3"
    ;;
*)
    [[ $# -eq 2 || $# -eq 3 ]] || die "usage: provide_criu.sh PREFIX PYTHON [PARTS]"
    main "$@"
    ;;
esac
