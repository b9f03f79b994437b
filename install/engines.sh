# The container engines of a node: which are there, how the runtime is registered with them, how they are told. Sourced by
# install.sh and uninstall.sh, after lib.sh.
# shellcheck shell=bash disable=SC2154 # settings of install.sh

# What registers the runtime with the engines; install.sh puts it beside uninstall.sh.
# shellcheck disable=SC2034
registering=(register.py register_{containerd,crio,docker,podman,settings}.py containerd_config.py engine.py
    journal.py json_text.py marked.py still_named.py toml_own.py toml_text.py)

# engine_program ENGINE: prints the program that runs on this node, or would; nothing if there is none. A service may run
# another one than PATH has.
engine_program() {
    local program pid name=$1
    [[ $name != docker ]] || name=dockerd
    if [[ -d /run/systemd/system && $1 != podman ]]; then
        pid=$(systemctl show --property MainPID --value "$1" 2>/dev/null || true)
        program=$(readlink "/proc/${pid:-0}/exe" 2>/dev/null || true)
        if [[ ${program##*/} == "$name" && -x $program ]]; then
            printf '%s\n' "$program"
            return
        fi
    fi
    command -v "$name" || true
}

# restart_engine ENGINE NO_RESTART(yes|no): makes a change of its configuration known. Restarting leaves containers alone
# (their shims and monitors live on); Docker reads its runtimes again on a signal; Podman has no daemon. Only where
# systemd runs it: elsewhere its owner knows how. Sets $restarted to yes or no.
restart_engine() {
    local verb=restart done=restarted
    restarted=no
    case $1 in
    podman)
        restarted=yes
        return 0
        ;;
    docker) verb=reload done=reloaded ;;
    esac
    if [[ $2 == yes ]]; then
        say "$1: $verb it to make the change known (--no-restart was given)"
    elif [[ -d /run/systemd/system ]] && systemctl is-active --quiet "$1"; then
        systemctl "$verb" "$1" || return 1
        say "$1: $done"
        restarted=yes
    else
        say "$1: not running under systemd; $verb it yourself to make the change known"
    fi
}

# started_since FILE ENGINE: whether the engine's daemon runs, and each of its processes was started after FILE was changed.
# By whole seconds: one that was started within the same is told once more.
started_since() {
    local changed boot ticks file comm fields found=no name=$2
    [[ $name != docker ]] || name=dockerd
    changed=$(stat -c %Y "$1")
    boot=$(sed -n 's/^btime //p' /proc/stat)
    ticks=$(getconf CLK_TCK)
    for file in /proc/[0-9]*/comm; do
        { read -r comm <"$file"; } 2>/dev/null || continue # it ended meanwhile
        [[ $comm == "$name" ]] || continue
        { read -r fields <"${file%comm}stat"; } 2>/dev/null || continue
        read -ra fields <<<"${fields##*) }"
        [[ $((boot + fields[19] / ticks)) -gt $changed ]] || return 1
        found=yes
    done
    [[ $found == yes ]]
}

# note_restart ENGINE: before its file is changed, so that after a kill in between another run restarts it. Adds the engine to
# $pending if one was killed then, or was not to restart it, and nobody else has since.
note_restart() {
    [[ ! -e $state/restart.$1 ]] || started_since "$state/restart.$1" "$1" || pending+="$1 "
    mkdir -p "$state"
    mark_restart "$1"
}

mark_restart() { : >"$state/restart.$1"; }

forget_restart() { rm -f "$state/restart.$1"; }

absolute() { if [[ $1 == /* ]]; then printf '%s\n' "$1"; else printf '%s\n' "$PWD/$1"; fi; }

# engine_list OPTION LIST: prints the names, a space between them.
engine_list() {
    local name names
    IFS=, read -ra names <<<"$2,"
    [[ $2 != *, && $2 != ,* ]] || names+=("")
    for name in "${names[@]}"; do
        case $name in
        containerd | crio | docker | podman) ;;
        *) die "$1: there is no engine '$name'; it takes containerd, crio, docker and podman, commas between them" ;;
        esac
    done
    printf '%s\n' "${names[*]}"
}

default_config() {
    case $1 in
    containerd) echo /etc/containerd/config.toml ;;
    crio) echo /etc/crio/crio.conf.d/99-rewarm.conf ;;
    docker) echo /etc/docker/daemon.json ;;
    podman) echo /etc/containers/containers.conf.d/rewarm.conf ;;
    esac
}

# chosen ENGINE: whether to register with it. Podman's and CRI-O's drop-ins say nothing of whether they are there.
chosen() {
    [[ " $excluded " != *" $1 "* ]] || return 1
    [[ -z $engines ]] || {
        [[ " $engines " == *" $1 "* ]]
        return
    }
    case $1 in
    containerd) command -v containerd || [[ -e /etc/containerd/config.toml ]] ;;
    crio) command -v crio || [[ -d /etc/crio ]] ;;
    docker) command -v dockerd || [[ -e /etc/docker/daemon.json ]] ;;
    podman) command -v podman ;;
    esac >/dev/null
}

register_runtime() {
    local name python words status=0 arguments=() names=() pending=" "
    if [[ $register == no ]]; then
        say "engines: not registered (--no-register)"
        return
    fi
    for name in containerd crio docker podman; do
        if ! chosen "$name"; then
            say "$name: not registered ($([[ -n "$engines$excluded" ]] && echo "left out" || echo "not on this node"))"
            continue
        fi
        names+=("$name")
        [[ -n ${configs[$name]:-} ]] || note_restart "$name"
        arguments+=("$name=${configs[$name]:-$(default_config "$name")}:$(engine_program "$name")")
    done
    [[ ${#names[@]} -gt 0 ]] || return 0
    python=$(find_python)
    words=$("$python" -E -s -B "$here/register.py" register --binary "$prefix/bin/rewarm-runc" --state "$state" \
        --settings "$settings" --python "$prefix/venv/bin/python3" "${arguments[@]}") || status=1
    for name in "${names[@]}"; do
        if grep -qxF "$name changed" <<<"$words"; then
            say "$name: the runtime 'rewarm' is registered"
        elif grep -qxF "$name unchanged" <<<"$words" && [[ $pending == *" $name "* ]]; then
            say "$name: needs no change, but to be told of the last one"
        else
            if grep -qxF "$name unchanged" <<<"$words"; then say "$name: needs no change"; fi
            # A register.py that broke down says nothing, and may have changed the file.
            if [[ -n $words && $pending != *" $name "* ]]; then forget_restart "$name"; fi
            continue
        fi
        [[ -z ${configs[$name]:-} ]] || continue
        if ! restart_engine "$name" "$no_restart"; then
            "$python" -E -s -B "$here/register.py" unregister --state "$state" "$name" >/dev/null ||
                die "$name did not start with the runtime, and its configuration could not be put back;" \
                    "mend what is named above, then: systemctl restart $name"
            restart_engine "$name" no || true
            forget_restart "$name"
            die "$name did not start with the runtime; its configuration was put back; see: journalctl -u $name"
        fi
        # Else the next run finds it untold, unless it was started after this.
        if [[ $restarted == yes ]]; then forget_restart "$name"; else mark_restart "$name"; fi
    done
    [[ $status -eq 0 ]] || die "not every engine has the runtime; the rest is installed, so mend this and run again"
    verify
}

# verify: by rewarm's own eyes. Sets $ready to no, or to untold where only those have failed that --no-restart leaves to be
# told.
verify() {
    local said line failed untold=0
    if said=$(REWARM_CONFIG=$settings "$prefix/bin/rewarm" doctor --node); then
        printf '%s\n' "$said"
        return
    fi
    printf '%s\n' "$said"
    ready=no
    [[ $no_restart == yes ]] || return 0
    failed=$(grep -c '^failed ' <<<"$said" || true)
    for line in containerd:containerd crio:CRI-O docker:Docker; do
        [[ -e $state/restart.${line%:*} ]] && grep -q "^failed *${line#*:} " <<<"$said" && untold=$((untold + 1))
    done
    [[ $untold -eq 0 || $untold -lt $failed ]] || ready=untold
}
