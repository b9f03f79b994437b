#!/usr/bin/env bash
# Installs rewarm on this node: its virtual environment, the C programs, CRIU, and the runtime `rewarm` in each container
# engine that is there: containerd, CRI-O, Docker, Podman.
# Can be run again at any time: it does what is missing, and an upgrade is one rename at a time, so that nothing is ever
# found half written. What goes on meanwhile, a restore or a capture, ends with the modules that it began with.
set -euo pipefail
umask 022
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source_tree=$(dirname "$here")
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"
# shellcheck source-path=SCRIPTDIR source=engines.sh
. "$here/engines.sh"

usage() {
    cat <<'EOF'
usage: install.sh [options]       (as root, on Debian 12 or newer, or Ubuntu)

  --prefix DIRECTORY         where to install (default: /opt/rewarm)
  --engines LIST             register with these only, of containerd,crio,docker,podman (default: those that are there)
  --exclude-engines LIST     leave these alone
  --no-register              leave all of them alone
  --containerd-config FILE   containerd's configuration (default: /etc/containerd/config.toml)
  --crio-config FILE         rewarm's drop-in for CRI-O (default: /etc/crio/crio.conf.d/99-rewarm.conf)
  --docker-config FILE       Docker's configuration (default: /etc/docker/daemon.json)
  --podman-config FILE       rewarm's drop-in for Podman (default: /etc/containers/containers.conf.d/rewarm.conf)
  --settings FILE            rewarm's settings, where a low-level runtime that is not runc is noted
                             (default: /etc/rewarm/config.yaml)
  --no-restart               do not restart or reload an engine after a change of its configuration
  --no-packages              install nothing with apt: name what is missing, and stop
  --from DIRECTORY           build and download nothing: install what parts.sh made there
  --help                     this text

Naming configuration files registers with their engines only, unless --engines says more. uninstall.sh undoes it.

Exit status: 0, also with --no-restart where only that restart is missing; 1 when something is not installed; 3 when all
is installed, but `rewarm doctor --node`, which is run at the end, finds an engine that cannot start containers with it.
EOF
}

prefix=/opt/rewarm
declare -A configs=()
engines=
excluded=
settings=/etc/rewarm/config.yaml
register=yes
no_restart=no
packages=yes
from=
ready=yes

# take_option NAME VALUE
take_option() {
    case $1 in
    --prefix) prefix=$2 ;;
    --engines) engines=$(engine_list "$1" "$2") || exit 1 ;;
    --exclude-engines) excluded=$(engine_list "$1" "$2") || exit 1 ;;
    --settings) settings=$(absolute "$2") ;;
    --containerd-config | --crio-config | --docker-config | --podman-config)
        # What stands between the words of register.py's arguments.
        case $2 in *[:=]* | *$'\n'*) die "$1 $2: may hold no ':', '=' or line break" ;; esac
        local name=${1#--}
        configs[${name%-config}]=$(absolute "$2")
        ;;
    *) die "unknown option '$1'; see install.sh --help" ;;
    esac
}

parse_arguments() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        --prefix | --engines | --exclude-engines | --settings | --containerd-config | --crio-config | --docker-config | \
            --podman-config)
            [[ -n ${2:-} ]] || die "$1 needs a value"
            take_option "$1" "$2"
            shift
            ;;
        --prefix=?* | --engines=?* | --exclude-engines=?* | --settings=?* | --*-config=?*)
            take_option "${1%%=*}" "${1#*=}"
            ;;
        --no-register) register=no ;;
        --no-restart) no_restart=yes ;;
        --no-packages) packages=no ;;
        --from)
            from=${2:-}
            [[ -n $from ]] || die "--from needs a value"
            shift
            ;;
        --from=?*) from=${1#*=} ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) die "unknown option '$1'; see install.sh --help" ;;
        esac
        shift
    done
    check_prefix "$prefix"
    [[ $register == yes || (${#configs[@]} -eq 0 && -z $engines) ]] ||
        die "--no-register and the options that name engines or their files exclude each other"
    [[ ${#configs[@]} -eq 0 || -n $engines ]] || engines=${!configs[*]}
}

# check_parts: whether --from names what parts.sh made, for this machine.
check_parts() {
    [[ -e $from/complete ]] || die "--from $from: holds no parts of rewarm; make them with install/parts.sh"
    [[ $(<"$from/complete") == "$(uname -m)" ]] || die "--from $from: is for $(<"$from/complete"), this is $(uname -m)"
    from=$(cd "$from" && pwd)
}

# The system's own interpreter, by its versioned name: a version manager's shim may vanish with its user, and a venv
# of `python3` would stop to find its packages when a release upgrade puts another version under that name.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 /usr/bin/python3.[0-9]*; do
        [[ $candidate =~ /python3(\.[0-9]+)?$ && -x $candidate ]] || continue
        if "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            readlink -f "$candidate"
            return
        fi
    done
}

# missing_packages: prints the apt package of each thing that the install or a restore needs and that is not there.
missing_packages() {
    local python name=python3
    python=$(find_python)
    if [[ -n $from ]]; then
        # Nothing is compiled, and pip comes as a wheel: the standard library is enough.
        "${python:-false}" -I -c 'import venv' 2>/dev/null || echo python3
    elif [[ -z $python ]]; then
        printf '%s\n' python3 python3-venv python3-dev
    else
        [[ $python == "$(readlink -f /usr/bin/python3)" ]] || name=${python##*/}
        "$python" -I -c 'import ensurepip, venv' 2>/dev/null || echo "$name-venv"
        "$python" -I -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
            echo "$name-dev"
    fi
    local pair tools=(gcc:gcc make:make)
    if [[ -n $from ]]; then
        tools=()
    else
        [[ -e /usr/include/stdio.h ]] || echo libc6-dev
        [[ -e /etc/ssl/certs/ca-certificates.crt ]] || echo ca-certificates
    fi
    # CRIU locks the network with iptables-restore, and archives a tmpfs with tar and a network namespace with ip.
    for pair in "${tools[@]}" tar:tar gzip:gzip runc:runc iptables-restore:iptables ip:iproute2 nsenter:util-linux; do
        command -v "${pair%%:*}" >/dev/null || echo "${pair#*:}"
    done
}

provide_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    if [[ ${#missing[@]} -eq 0 ]]; then
        say "packages: everything needed is there"
        return
    fi
    [[ $packages == yes ]] || die "missing, and --no-packages was given: apt-get install ${missing[*]}"
    command -v apt-get >/dev/null || die "missing: ${missing[*]} (names of Debian's packages); this system has no apt-get"
    say "packages: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}")
    # Lists that are missing or older than the mirror are only found out by trying.
    if ! "${install[@]}" >/dev/null 2>&1 </dev/null; then
        quietly "packages: reading the lists" apt-get update -o DPkg::Lock::Timeout=120
        quietly "packages: installing" "${install[@]}"
    fi
    mkdir -p "$state"
    printf '%s\n' "${missing[@]}" >>"$state/packages"
    mapfile -t missing < <(missing_packages)
    [[ ${#missing[@]} -eq 0 ]] || die "still missing after apt-get install: ${missing[*]} (python3 has to be 3.11 or newer)"
}

works() { "$1/bin/python3" -I -c 'import rewarm, rewarm.errors, rewarm_hooks, rewarm_native' 2>/dev/null; }

# what_is_installed: prints what the virtual environment is made from, as digests.
what_is_installed() {
    sha256sum <"$here/install.sh"
    if [[ -n $from ]]; then cd "$from/wheels"; else cd "$work/source"; fi
    find . -type f -print0 | sort -z | xargs -0 sha256sum
}

# fill_environment PYTHON DIRECTORY: a virtual environment with rewarm, and without pip and setuptools: rewarm needs
# neither, and setuptools has a .pth file that every start of Python would pay for.
fill_environment() {
    local venv=$2/bin/python3 pip
    if [[ -n $from ]]; then
        pip=$(echo "$from"/wheels/pip-*.whl)
        quietly "python: making the virtual environment" "$1" -I -m venv --without-pip "$2"
        quietly "python: installing rewarm" "$venv" -I "$pip/pip" install --no-input --disable-pip-version-check \
            --isolated --no-index --find-links "$from/wheels" rewarm
        return
    fi
    quietly "python: making the virtual environment" "$1" -I -m venv "$2"
    quietly "python: installing rewarm" "$venv" -I -m pip install --no-input "$work/source"
    quietly "python: removing pip" "$venv" -I -m pip uninstall --yes setuptools pip
}

# in_use DIRECTORY: whether a process names it in its words: the launcher, and what it starts, run from the version itself.
in_use() {
    local file words
    for file in /proc/[0-9]*/cmdline; do
        words=()
        mapfile -d '' -t words 2>/dev/null <"$file" || true # it ended meanwhile
        [[ "${words[*]}" != *"$1/"* ]] || return 0
    done
    return 1
}

# install_python: a virtual environment for each version of the source, and `venv`, a link to the one that counts. Kept are
# those that a process runs from, and the one before, by whose link one may just be starting.
install_python() {
    local python id directory previous old
    python=$(find_python)
    id=$( (
        "$python" -VV
        what_is_installed
    ) | sha256sum | cut -c 1-16)
    directory=$prefix/venvs/$id
    previous=$(readlink "$prefix/venv" || true)
    if [[ -e $directory/.complete ]] && works "$directory"; then
        say "python: this version is installed already"
    else
        say "python: building a virtual environment with $python"
        rm -rf "$directory"
        mkdir -p "$prefix/venvs"
        fill_environment "$python" "$directory"
        works "$directory" || {
            "$directory/bin/python3" -I -c 'import rewarm, rewarm.errors, rewarm_hooks, rewarm_native' >&2 || true
            die "python: the installed packages cannot be imported"
        }
        # Not by way of the link: what has begun stays with its version.
        sed -i "1s|.*|#!$directory/bin/python3 -I|" "$directory/bin/rewarm"
        : >"$directory/.complete"
    fi
    if [[ -d $prefix/venv && ! -L $prefix/venv ]]; then
        mv -T "$prefix/venv" "$prefix/venvs/replaced"
    fi
    install_link "venvs/$id" "$prefix/venv"
    for old in "$prefix"/venvs/*; do
        [[ $old == "$directory" || "venvs/${old##*/}" == "$previous" ]] || in_use "$old" || rm -rf "$old"
    done
}

install_programs() {
    local build=${from:+$from/programs} name hooks
    if [[ -z $build ]]; then
        build=$work/build
        quietly "C programs: building" make -C "$work/source/native" BUILD="$build"
    fi
    install_file "$build/rewarm-guard" "$prefix/libexec/rewarm-guard" 0755
    install_file "$build/rewarm-device-memory.so" "$prefix/lib/rewarm-device-memory.so" 0644
    hooks=$("$prefix/venv/bin/python3" -I -c 'import rewarm_hooks; print(*rewarm_hooks.__path__)')
    for name in __init__ workload; do
        install_file "$hooks/$name.py" "$prefix/lib/rewarm-hooks/rewarm_hooks/$name.py" 0644
    done
    install_link ../venv/bin/rewarm "$prefix/bin/rewarm"
    # Last: from here on containerd can call it.
    install_file "$build/rewarm-runc" "$prefix/bin/rewarm-runc" 0755
    "$prefix/bin/rewarm-runc" --version >/dev/null || die "C programs: $prefix/bin/rewarm-runc does not run"
    for name in uninstall.sh lib.sh engines.sh "${registering[@]}"; do
        install_file "$here/$name" "$prefix/share/rewarm/$name" "$(stat -c %a "$here/$name")"
    done
    for name in "$source_tree"/config/*; do
        [[ ! -f $name ]] || install_file "$name" "$prefix/share/rewarm/config/${name##*/}" 0644
    done
    say "C programs: $prefix/bin/rewarm-runc, $prefix/libexec/rewarm-guard"
}

# The names that people and tools look for, for the node's own install only.
link_into_path() {
    [[ $prefix == /opt/rewarm ]] || return 0
    local link target
    for link in /usr/local/bin/rewarm /usr/local/sbin/rewarm-runc; do
        target=$prefix/bin/${link##*/}
        if [[ -e $link || -L $link ]] && [[ $(readlink "$link") != "$target" ]]; then
            warn "$link is something else: left alone; use $target"
        else
            install_link "$target" "$link"
        fi
    done
}

main() {
    parse_arguments "$@"
    [[ $(id -u) -eq 0 ]] || die "has to run as root"
    [[ -z $from ]] || check_parts
    state=$(state_directory "$prefix")
    mkdir -p "$prefix"
    exec {lock}>"$prefix/.lock"
    flock -n "$lock" || die "another install.sh or uninstall.sh works on $prefix"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    provide_packages
    [[ -n $from ]] || stage_source "$source_tree" "$work/source"
    install_python
    install_programs
    link_into_path
    bash "$here/provide_criu.sh" "$prefix" "$(find_python)" ${from:+"$from"} || exit 1
    register_runtime
    case $ready in
    yes) say "installed in $prefix; check the node with: $prefix/bin/rewarm doctor, and doctor --node for its engines" ;;
    untold)
        say "installed in $prefix; ready when the engines named above are told (--no-restart was given)," \
            "see then: $prefix/bin/rewarm doctor --node"
        ;;
    no)
        printf 'rewarm: error: %s\n' "installed in $prefix, but the node is not ready: mend what failed above, and run: \
$prefix/bin/rewarm doctor --node" >&2
        exit 3
        ;;
    esac
}

main "$@"
