#!/usr/bin/env bash
# Takes rewarm off this node and puts back what install.sh found. Stops no container; while some still need the runtime (it is
# what kills and deletes them) it refuses.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"
# shellcheck source-path=SCRIPTDIR source=engines.sh
. "$here/engines.sh"

usage() {
    cat <<'EOF'
usage: uninstall.sh [options]       (as root)

  --prefix DIRECTORY   where rewarm is installed (default: /opt/rewarm)
  --purge              remove the node's settings, state and snapshots, too (/etc/rewarm, /var/lib/rewarm, /run/rewarm)
  --force              even while containers run that need the runtime: nothing will be able to stop them by name
  --no-restart         do not restart or reload an engine after its configuration was put back
  --help               this text
EOF
}

prefix=/opt/rewarm
purge=no
force=no
no_restart=no

parse_arguments() {
    while [[ $# -gt 0 ]]; do
        case $1 in
        --prefix)
            [[ -n ${2:-} ]] || die "$1 needs a value"
            prefix=$2
            shift
            ;;
        --prefix=*) prefix=${1#*=} ;;
        --purge) purge=yes ;;
        --force) force=yes ;;
        --no-restart) no_restart=yes ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) die "unknown option '$1'; see uninstall.sh --help" ;;
        esac
        shift
    done
    check_prefix "$prefix"
    [[ $purge == no || $prefix == /opt/rewarm ]] ||
        die "--purge removes what belongs to the node, not to $prefix; it goes with --prefix /opt/rewarm only"
}

# users: prints a line for each task of containerd and each process that would miss the runtime.
users() {
    local task file words word link=$prefix/bin/rewarm-runc
    [[ $prefix != /opt/rewarm ]] || link=/usr/local/sbin/rewarm-runc
    shopt -s nullglob
    for task in /run/{containerd,*/containerd,docker/containerd/daemon}/io.containerd.runtime.v2.task/*/*/; do
        for file in "$task"{runtime,options.json}; do
            if grep -qsF -e "$prefix/bin/rewarm-runc" -e "$link" "$file"; then
                echo "containerd task ${task%/}"
                break
            fi
        done
    done
    if [[ $prefix == /opt/rewarm ]]; then
        for task in /run/rewarm/containers/*/*/; do
            echo "restored container ${task%/}"
        done
    fi
    shopt -u nullglob
    for file in /proc/[0-9]*/cmdline; do
        words=()
        mapfile -d '' -t words 2>/dev/null <"$file" || true # it ended meanwhile
        [[ ${#words[@]} -gt 0 ]] || continue
        # In a container the same name is another program.
        [[ ! -e $prefix || ${file%cmdline}root$prefix -ef $prefix ]] || continue
        for word in "${words[@]}"; do
            # conmon names its runtime by an option's value; our own programs are the first word.
            if [[ $word == "$prefix/bin/rewarm-runc" || $word == "$link" || ${words[0]} == "$prefix"/* ]]; then
                file=${file%/cmdline}
                echo "process ${file#/proc/}: ${words[*]:0:4}"
                break
            fi
        done
    done
}

unregister() {
    local python words name at_home=() pending=" "
    for python in /usr/bin/python3 /usr/bin/python3.[0-9]* "$prefix/venv/bin/python3" ""; do
        [[ -n $python ]] || die "no python3 with tomllib to edit the engines' configuration with"
        if "$python" -I -c 'import tomllib' 2>/dev/null; then break; fi
    done
    for name in containerd crio docker; do
        if grep -qs '"/etc/' "$state/$name.json" || [[ -e $state/restart.$name ]]; then
            at_home+=("$name")
            note_restart "$name"
        fi
    done
    words=$("$python" -E -s -B "$here/register.py" unregister --state "$state" \
        --removes "$prefix/bin/rewarm-runc") ||
        die "an engine's configuration could not be put back; rewarm stays installed: mend this and run again"
    for name in "${at_home[@]}"; do
        if grep -qxF "$name changed" <<<"$words" || [[ $pending == *" $name "* ]]; then
            restart_engine "$name" "$no_restart" || warn "$name did not restart; see: journalctl -u $name"
            # It takes runtimes anew from a file that has some, and keeps the old ones with a file that has none.
            [[ $name != docker ]] || say "docker: if its file names no other runtime, it forgets this one when it is restarted"
        fi
    done
}

remove_links() {
    local link
    for link in /usr/local/bin/rewarm /usr/local/sbin/rewarm-runc; do
        if [[ -L $link && $(readlink "$link") == "$prefix/bin/${link##*/}" ]]; then rm -f "$link"; fi
    done
}

remove_files() {
    # What install.sh made, name by name: the prefix may hold other people's files.
    rm -f "$prefix"/{bin/rewarm-runc,bin/rewarm,libexec/rewarm-guard,lib/rewarm-device-memory.so}
    rm -f "$prefix"/{bin/rewarm-runc,bin/rewarm,libexec/rewarm-guard,lib/rewarm-device-memory.so,venv}.new.*
    rm -rf "$prefix/venv" "$prefix/venvs" "$prefix/criu" "$prefix/share/rewarm" "$prefix/lib/rewarm-hooks"
    if [[ -e $state/packages ]]; then
        say "left in place, installed for rewarm: $(sort -u "$state/packages" | tr '\n' ' ')"
    fi
    rm -rf "$state"
    rm -f "$prefix/.lock"
    local directory
    for directory in "$prefix"/{bin,lib,libexec,share} "$prefix" "$(dirname "$state")"; do
        [[ ! -d $directory ]] || rmdir --ignore-fail-on-non-empty "$directory"
    done
}

# refuse_mounts: what is mounted where --purge removes everything is not rewarm's (the store that the DaemonSet binds there, a
# disk of the admin's), and rm follows a bind mount of the same file system. What is mounted for containers is.
refuse_mounts() {
    local point
    while read -r _ _ _ _ point _; do
        printf -v point %b "$point" # a blank is \040 there
        case $point in
        /run/rewarm/containers/*) ;;
        /etc/rewarm | /etc/rewarm/* | /var/lib/rewarm | /var/lib/rewarm/* | /run/rewarm | /run/rewarm/*)
            die "--purge: $point is a mount, whose content may be somebody else's; run: umount $point, then this again"
            ;;
        esac
    done </proc/self/mountinfo
}

purge_node() {
    local store directory
    store=$(sed -n 's/^store:[[:space:]]*//p' /etc/rewarm/config.yaml 2>/dev/null || true)
    refuse_mounts # once more: one may have come meanwhile
    # Of containers that were deleted without rewarm: each control directory is a file system of its own.
    for directory in /run/rewarm/containers/*/*/control; do
        ! mountpoint -q "$directory" || umount -l "$directory"
    done
    rm -rf --one-file-system /etc/rewarm /var/lib/rewarm /run/rewarm
    say "removed /etc/rewarm, /var/lib/rewarm and /run/rewarm"
    [[ -z $store ]] || say "if other nodes do not use it, remove the store, too: $store"
}

main() {
    parse_arguments "$@"
    [[ $(id -u) -eq 0 ]] || die "has to run as root"
    [[ $purge == no ]] || refuse_mounts
    state=$(state_directory "$prefix")
    if [[ -d $prefix ]]; then
        exec {lock}>"$prefix/.lock"
        flock -n "$lock" || die "another install.sh or uninstall.sh works on $prefix"
    fi
    local needed
    needed=$(users)
    if [[ -n $needed ]]; then
        printf '%s\n' "$needed" >&2
        [[ $force == yes ]] || die "these still need the runtime: stop them first, or give --force"
    fi
    if [[ -d $prefix || -d $state ]]; then
        unregister
        # What was started since the first look, by an engine that still knew the runtime.
        needed=$(users)
        if [[ -n $needed && $force == no ]]; then
            printf '%s\n' "$needed" >&2
            die "these were started meanwhile: the engines do not know the runtime any more, rewarm stays until they end; run again"
        fi
        remove_links
        remove_files
        say "removed from $prefix"
    else
        say "nothing is installed in $prefix"
    fi
    if [[ $purge == yes ]]; then purge_node; fi
    exit 0 # bash reads a script as it runs, and this one may be gone
}

main "$@"
