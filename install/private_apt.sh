# An apt with a state of its own: another suite's package from the mirrors in the machine's own apt configuration.
# Nothing is installed on the system; apt checks the signatures. Sourced, not run, after lib.sh or what has its `die`.
# shellcheck shell=bash disable=SC2154 # what it reads is its caller's

private_apt_here=$(dirname "${BASH_SOURCE[0]}")

# private_apt PACKAGE SUITE MINIMUM: prepares it under $work/SUITE. 1 if it does not offer PACKAGE at MINIMUM or newer.
# Reads $work, $python (>= 3.11), $codename and $origin of this distribution's release, and the archive's $components.
# Sets $conf: `apt-get -c "$conf"` uses it, and what that downloads lies in cache/archives beside it.
private_apt() {
    local package=$1 suite=$2 minimum=$3 dir=$work/$2 lists parts files entry candidate
    mkdir -p "$dir"/{state,lists/partial,cache/archives/partial,sources}
    : >"$dir/status"
    architecture=$(dpkg --print-architecture)
    conf=$dir/apt.conf
    # Read after the machine's own files (-c): proxy, certificates and authentication stay, its hooks do not.
    cat >"$conf" <<EOF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architectures { "$architecture"; };
APT::Default-Release "";
APT::Get::List-Cleanup "0";
Acquire::Languages "none";
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::State::lists "$dir/lists";
Dir::Cache "$dir/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$dir/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
EOF
    eval "$(apt-config shell lists Dir::Etc::sourcelist/f parts Dir::Etc::sourceparts/d)"
    files=()
    for entry in "$lists" "$parts"/*.list "$parts"/*.sources; do
        [[ -f $entry ]] && files+=("$entry")
    done
    [[ ${#files[@]} -gt 0 ]] || die "$package: apt has no sources (neither $lists nor $parts/*)"
    "$python" -I "$private_apt_here/apt_sources.py" "$codename" "$suite" "$components" "$dir/sources" "${files[@]}" ||
        die "$package: apt's sources name no $origin mirror for $codename; add one, or install $package >= $minimum by hand"
    # A third party's source may use the same words and have no such suite: that is not fatal. What is not the
    # distribution's own is taken out again before anything is resolved.
    apt-get -c "$conf" update >"$dir/update.log" 2>&1 </dev/null || true
    for entry in "$dir"/sources/*.sources; do
        # shellcheck disable=SC2016 # the words are apt's, not the shell's
        apt-get -c "$conf" indextargets --format '$(SOURCESENTRY) $(ORIGIN)' 2>/dev/null |
            grep -qxF "$entry:1 $origin" || rm -f "$entry"
    done
    candidate=$(apt-cache -c "$conf" policy "$package" | sed -n 's/^ *Candidate: *//p')
    [[ -n $candidate && $candidate != "(none)" ]] && at_least "${candidate#*:}" "$minimum"
}
