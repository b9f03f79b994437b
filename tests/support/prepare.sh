#!/bin/bash
# Sets up what the tests and the demo need on a fresh Debian 12 or 13, as root: packages of the machine, and root
# filesystems in a cache directory (default: <repository>/build/rootfs):
#   base/  the machine's own Debian suite with python3 and redis-server
#   slim/  the same suite with apt and ca-certificates, what images are built from
#   ocr/   a layer with opt/ocr: RapidOCR with its weights, on ONNX Runtime
#   loop/  a layer with opt/loop: uvloop
#   containerd2/  containerd 2.1 or newer: bin/containerd, bin/ctr, bin/containerd-shim-runc-v2
#   docker/       bin/dockerd, version 24 or newer, which hands annotations to the runtime
#   kustomize/    bin/kustomize, version 5
#   kernel/       vmlinuz and initrd of the suite's own kernel, for virtual machines (guest.py)
# A second run finds the stamps of the first and does nothing. No service is started, nothing outside the cache
# directory is changed but by apt.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
requirements=$here/workloads/requirements.txt
# Raise it when a change of this script must reach existing caches.
recipe=1

packages=(
    bindfs
    busybox-static
    ca-certificates
    conmon
    containerd
    containernetworking-plugins
    debian-archive-keyring
    docker.io
    fio
    gcc
    iproute2
    iptables
    libc6-dev
    make
    mmdebstrap
    mount
    musl-tools
    podman
    qemu-system-x86
    python3
    python3-dev
    python3-venv
    runc
    shellcheck
    systemd
    xz-utils
    util-linux
)

say() { printf 'prepare: %s\n' "$*" >&2; }
die() { say "$1${2:+; $2}"; exit 1; }
at_least() { [[ $(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1) == "$2" ]]; }
# shellcheck source-path=SCRIPTDIR source=../../install/private_apt.sh
. "$repository/install/private_apt.sh"

[ $# -le 1 ] || die "too many arguments" "usage: prepare.sh [CACHE_DIRECTORY]"
[ "$(id -u)" = 0 ] || die "needs root" "run it with sudo"
command -v apt-get >/dev/null || die "no apt-get here" "use Debian 12 or 13"

cache=${1:-$repository/build/rootfs}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

# One preparation at a time: two of them would build the same directories.
exec 9>"$cache/.lock"
flock 9

scratch=
policy=
clean_up() {
    [ -z "$policy" ] || rm -f "$policy"
    [ -z "$scratch" ] || rm -rf --one-file-system "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

updated=
apt_update() {
    [ -n "$updated" ] && return
    apt-get -q -o Dpkg::Use-Pty=0 update >&2 || die "apt-get update failed" "mend this machine's apt sources"
    updated=1
}

install_packages() {
    local missing=() package
    for package in "${packages[@]}"; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    apt_update
    # policy-rc.d keeps the packages' scripts from starting their services; a machine's own policy stays.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 0755 "$policy"
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends "${missing[@]}" >&2 ||
        die "apt-get install failed" "see its message above"
    if [ -n "$policy" ]; then
        rm -f "$policy"
        policy=
    fi
}

# Debian's own sources of this machine as one-line entries: other vendors' packages have no place in the base.
debian_sources() {
    local keyring uri release codename origin component
    for keyring in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
        [ -e "$keyring" ] && break
    done
    # shellcheck disable=SC2016 # the variables are apt-get's
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(CODENAME) $(ORIGIN) $(COMPONENT)' 'Identifier: Packages' |
        while read -r uri release codename origin component; do
            [ "$origin" = Debian ] || continue
            case $codename in
                "$suite" | "$suite"-updates | "$suite"-security)
                    printf 'deb [signed-by=%s] %s %s %s\n' "$keyring" "$uri" "$release" "$component" ;;
            esac
        done | sort -u
}

# bootstrap DIRECTORY OPTION...: the machine's suite, without documentation.
bootstrap() {
    local sources option=() name value directory=$1
    shift
    sources=$(debian_sources)
    if [ -z "$sources" ]; then # the lists were never fetched, or were cleaned away: the origin is in them
        apt_update
        sources=$(debian_sources)
    fi
    [ -n "$sources" ] || die "apt has no source of Debian $suite" "add one to /etc/apt/sources.list.d"
    # mmdebstrap has an apt configuration of its own: what this machine needs to reach its mirror goes with it.
    while read -r name value; do
        option+=("--aptopt=$name $value")
    done < <(apt-config dump | grep -E '^Acquire::(https?|ftp)::(Proxy|CaInfo|Verify-Peer)' | sed 's/;$//' || true)
    printf '%s\n' "$sources" >"$scratch/sources.list"
    mmdebstrap --quiet --mode=root "$@" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        "${option[@]}" "$suite" "$directory" "$scratch/sources.list" >&2
    rm -f "$directory"/var/cache/ldconfig/*
}

build_base() {
    bootstrap "$scratch/base" --variant=essential --include=python3,redis-server,libstdc++6,libgomp1,netbase
    rm -f "$scratch"/base/etc/apt/sources.list
}

build_slim() { bootstrap "$scratch/slim" --variant=apt --include=ca-certificates; }

python_of_layers() {
    [ -x "$scratch/venv/bin/pip" ] || /usr/bin/python3 -m venv "$scratch/venv"
}

# build_layer NAME REQUIREMENT...: a directory with opt/NAME, for PYTHONPATH, compiled as an installed package is.
build_layer() {
    local name=$1
    shift
    python_of_layers
    "$scratch/venv/bin/pip" --quiet --disable-pip-version-check install --only-binary :all: --no-cache-dir \
        --target "$scratch/$name/opt/$name" --constraint "$requirements" "$@" >&2
    local top=$scratch/$name/opt/$name
    rm -rf "${top:?}/bin" "$top"/onnxruntime/{transformers,quantization,tools,datasets}
    find "$top" -depth -type d -name tests -exec rm -rf {} +
    chmod -R u=rwX,go=rX "$scratch/$name"
}

# unpack NAME PACKAGE MINIMUM PROGRAM...: those programs of a package of Debian's, from the first of its suites that has
# it new enough, to be run beside the machine's own. They are Go's and need no library that Debian 12 has not.
unpack() {
    local name=$1 package=$2 minimum=$3 program python=/usr/bin/python3 codename=$suite origin=Debian components=main
    local conf newer work=$scratch/apt unpacked=$scratch/unpacked/$name
    shift 3
    mkdir -p "$work" "$unpacked" "$scratch/$name/bin"
    chmod 0755 "$scratch" "$work" # apt downloads as the user _apt
    for newer in bookworm trixie testing unstable ""; do
        [[ $newer = bookworm && $suite != bookworm ]] && continue
        [ -n "$newer" ] || die "none of Debian's suites offers $package >= $minimum at this machine's mirrors" "see: apt-get update"
        if private_apt "$package" "$newer" "$minimum"; then break; fi
    done
    (cd "$work" && apt-get -q -c "$conf" download "$package" >&2) || die "downloading $package failed"
    dpkg-deb -x "$work/$package"_*.deb "$unpacked" || die "unpacking $package failed"
    for program; do
        cp "$unpacked/$program" "$scratch/$name/bin" || die "$package of Debian's $newer has no $program"
        "$scratch/$name/bin/${program##*/}" --help >/dev/null 2>&1 || die "$program of Debian's $newer does not run here"
    done
    say "$package $(dpkg-deb -f "$work/$package"_*.deb Version) of Debian's $newer"
}

# The suite's kernel and an initramfs with the modules that a guest needs; nothing of it is installed on this machine.
build_kernel() {
    local meta package release place modules name work=$scratch/apt-kernel
    meta=linux-image-$(dpkg --print-architecture)
    mkdir -p "$work" "$scratch/kernel/tree/bin"
    chmod 0755 "$scratch" "$work" # apt downloads as the user _apt
    apt_update
    package=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
    [ -n "$package" ] || die "apt knows no $meta" "see: apt-get update"
    (cd "$work" && apt-get -q download "$package" >&2) || die "downloading $package failed"
    dpkg-deb -x "$work"/linux-image-*.deb "$work/root"
    place=$work/root/lib/modules
    [ -d "$place" ] || place=$work/root/usr/lib/modules # since Debian 13
    release=$(ls "$place")
    place=$place/$release
    cp "$work/root/boot/vmlinuz-$release" "$scratch/kernel/vmlinuz"
    modules=lib/modules/$release
    mkdir -p "$scratch/kernel/tree/$modules/kernel"
    cp "$place"/modules.{builtin,builtin.modinfo,order} "$scratch/kernel/tree/$modules/"
    for name in net fs/{9p,netfs,fscache,overlayfs,fuse} drivers/{virtio,char/hw_random,net} lib crypto arch; do
        [ -e "$place/kernel/$name" ] || continue # built in, or elsewhere in another release
        mkdir -p "$scratch/kernel/tree/$modules/kernel/$(dirname "$name")"
        cp -a "$place/kernel/$name" "$scratch/kernel/tree/$modules/kernel/$name"
    done
    rm -rf "$scratch/kernel/tree/$modules/kernel"/drivers/net/{ethernet,wireless,usb,can,wwan,phy,dsa,hamradio}
    find "$scratch/kernel/tree" -name '*.ko.xz' -exec xz -d {} +
    busybox depmod -b "$scratch/kernel/tree" "$release"
    cp "$(command -v busybox)" "$scratch/kernel/tree/bin/busybox"
    install -m 0755 "$here/guest/init.sh" "$scratch/kernel/tree/init"
    (cd "$scratch/kernel/tree" && find . | busybox cpio -o -H newc 2>/dev/null) | gzip -1 >"$scratch/kernel/initrd"
    rm -rf "$scratch/kernel/tree"
}

# provide NAME KEY COMMAND...: runs COMMAND, which fills $scratch/NAME, unless the cache has NAME made from KEY.
provide() {
    local name=$1 key=$2 began=$SECONDS
    shift 2
    key=$(printf '%s\n' "recipe $recipe" "$key" | sha256sum | cut -c1-64)
    if [ -d "$cache/$name" ] && [ "$(cat "$cache/.$name.stamp" 2>/dev/null)" = "$key" ]; then
        return 0
    fi
    [ -n "$scratch" ] || scratch=$(mktemp -d "$cache/.scratch.XXXXXX")
    say "building $cache/$name"
    "$@" || die "building $name failed" "see the message above"
    if grep -qF "$cache/$name" /proc/self/mounts; then
        die "$cache/$name is in use by a mount" "stop the containers that use it"
    fi
    rm -f "$cache/.$name.stamp"
    rm -rf --one-file-system "${cache:?}/$name"
    mv "$scratch/$name" "$cache/$name"
    printf '%s\n' "$key" >"$cache/.$name.stamp"
    say "built $name in $((SECONDS - began)) s"
}

# shellcheck source=/dev/null
suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
case $suite in
    bookworm | trixie) ;;
    *) die "this is not Debian 12 or 13 but \"$suite\"" "use one of them" ;;
esac

install_packages
abi=$(/usr/bin/python3 -c 'import sys; print(sys.implementation.cache_tag)')
pins=$(cat "$requirements")
provide base "$suite $(dpkg --print-architecture)" build_base
provide slim "$suite $(dpkg --print-architecture)" build_slim
provide ocr "$abi $pins" build_layer ocr rapidocr onnxruntime
provide loop "$abi $pins" build_layer loop uvloop
provide containerd2 "2.1 $(dpkg --print-architecture)" unpack containerd2 containerd 2.1 usr/bin/{containerd,ctr,containerd-shim-runc-v2}
provide docker "24 $(dpkg --print-architecture)" unpack docker docker.io 24 usr/sbin/dockerd
provide kustomize "5 $(dpkg --print-architecture)" unpack kustomize kustomize 5 usr/bin/kustomize
provide kernel "$suite $(sha256sum <"$here/guest/init.sh")" build_kernel
