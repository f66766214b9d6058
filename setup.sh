# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by diskimage-create.sh and run-tests: host packages from bindep.txt, Python's into .venv.
# Sets `venv`. Does nothing, and in no time, where all is there.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$checkout/.venv

fail() {
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 2
}

# bindep.txt has the packages of every use; those of another profile or system are left out.
packages_of() {
    local profile=$1 system
    system=$(. /etc/os-release && echo "$ID")
    sed -nE "s/^([a-z0-9.+-]+) \[platform:(dpkg|$system)( $profile)?\]$/\1/p" "$checkout/bindep.txt"
}

require_packages() {
    local profile=$1 package missing=()
    command -v dpkg-query > /dev/null || return 0 # the build itself names what it misses
    for package in $(packages_of "$profile"); do
        dpkg-query --show --showformat '${db:Status-Status}' "$package" 2> /dev/null |
            grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        fail "host packages are missing: ${missing[*]}" \
            "sudo apt-get install --no-install-recommends ${missing[*]}"
    fi
    echo "installing host packages: ${missing[*]}" >&2
    local words
    if ! words=$({ apt-get update &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } 2>&1); then
        fail "apt-get could not install ${missing[*]}: ${words##*$'\n'E:}" "apt-get update"
    fi
}

# What the venv is made of: the lock, and the project's own commands and plug-ins.
recipe_of() {
    cat "$checkout/requirements/$1.txt" "$checkout/pyproject.toml"
}

is_made() {
    recipe_of "$1" | cmp -s - "$venv/.made-$1" && [ -x "$venv/bin/amphora-image" ]
}

# The venv is as its recipe says; a stamp in it tells which recipe that was. In a subshell: what is
# exported for uv here must not reach a build.
require_venv() (
    ! is_made "$1" || exit 0
    lock=$checkout/requirements/$1.txt
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
        fail "python3 is missing or older than 3.11" "install Python 3.11 or newer"
    fi
    echo "installing Python packages into $venv" >&2
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    # A private CA is trusted if the host trusts it; an index that pip knows serves uv as well.
    export UV_SYSTEM_CERTS=1
    if [ -n "${PIP_INDEX_URL:-}" ]; then
        export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
    fi
    uv=("$venv/bin/uv" --quiet pip)
    # What another recipe has made is not whole any more.
    rm -f "$venv"/.made-*
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --require-hashes --requirement "$checkout/requirements/uv.txt"
    # diskimage-builder starts Python many times; without byte code each start takes a second more.
    "${uv[@]}" sync --compile-bytecode --python "$venv/bin/python" --require-hashes "$lock"
    "${uv[@]}" install --python "$venv/bin/python" --no-deps --no-build-isolation \
        --editable "$checkout"
    recipe_of "$1" > "$venv/.made-$1"
)
