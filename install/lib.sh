# What install.sh, uninstall.sh, parts.sh and provide_criu.sh share. Sourced, not run.
# shellcheck shell=bash


say() { printf 'rewarm: %s\n' "$*"; }
warn() { printf 'rewarm: warning: %s\n' "$*" >&2; }
die() {
    printf 'rewarm: error: %s\n' "$*" >&2
    exit 1
}

# quietly WHAT COMMAND...: runs a command that talks a lot; its words are shown only when it fails.
quietly() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        rm -f "$log"
        die "$what failed: $*"
    fi
    rm -f "$log"
}

# The prefix becomes part of a script's first line, of TOML and of shell words.
check_prefix() {
    case $1 in
    /*) ;;
    *) die "--prefix $1: must be an absolute path" ;;
    esac
    case $1 in
    *[!A-Za-z0-9._/+@=-]*) die "--prefix $1: may hold letters, digits and . _ / + @ = - only" ;;
    / | *//* | */ | */./* | */../* | */. | */..) die "--prefix $1: must be a plain directory name without trailing /, . or .." ;;
    esac
}

# state_directory PREFIX: where the install keeps what it found. Outside the prefix for a node's own install, so that
# it outlives a prefix that was removed by hand.
state_directory() {
    if [[ $1 == /opt/rewarm ]]; then
        printf '%s\n' /var/lib/rewarm/install
    else
        printf '%s\n' "$1/install-state"
    fi
}

# install_file SOURCE TARGET MODE: by rename, so that whoever runs or reads TARGET sees the old file or the new one.
install_file() {
    mkdir -p "$(dirname "$2")"
    install -m "$3" "$1" "$2.new.$$"
    mv -fT "$2.new.$$" "$2"
}

# install_link TARGET LINK: the same for a symlink.
install_link() {
    mkdir -p "$(dirname "$2")"
    ln -sfnT "$1" "$2.new.$$"
    mv -fT "$2.new.$$" "$2"
}

# stage_source TREE DIRECTORY: copies what is built from, without what earlier builds left there; TREE stays as it is.
stage_source() {
    mkdir "$2"
    tar -C "$1" -cf - \
        --exclude=__pycache__ --exclude='*.egg-info' --exclude=build --exclude='*.so' --exclude='*.o' \
        --exclude='.*_cache' --exclude=_native.c --exclude=_cuda.py pyproject.toml setup.py README.md shim hooks native |
        tar -C "$2" --no-same-owner -xf -
}

# at_least VERSION MINIMUM
at_least() { [[ $(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1) == "$2" ]]; }

# criu_minimum: prints the oldest CRIU that this kernel can do with. Linux 6.16 answers getsockopt(SO_PASSCRED) on an
# inet socket with EOPNOTSUPP, and CRIU dumps such sockets since 4.2.
criu_minimum() { if at_least "$(uname -r)" 6.16; then echo 4.2; else echo 4.1.1; fi; }

# criu_version PROGRAM: prints its version, nothing if it cannot be run.
criu_version() { "$1" --version 2>/dev/null | sed -n 's/^Version: *//p' || true; }
