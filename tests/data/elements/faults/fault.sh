# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# What can go wrong in an element; sourced by the hook of each phase.

phase=$(basename "$(dirname "$0")" .d)
echo "fault: in $phase"
case "${TINY_FAULT:-}" in
    "$phase:pause")
        echo "fault: pausing"
        sleep 300
        ;;
    "$phase:fail")
        echo "fault: the last words of an element"
        echo "fault: a second line, on standard error" >&2
        exit 7
        ;;
    "$phase:daemon")
        # Keeps its working directory and the build's output open, as a careless daemon does.
        setsid --fork sleep 301
        setsid --fork bash -c 'trap "" TERM HUP INT; exec sleep 302' > /dev/null 2>&1
        ;;
    "$phase:differ")
        # What a build must not put into an image.
        echo "${TZ:-} $HOSTNAME $(umask)" > "${TARGET_ROOT:-}/etc/built-by"
        ;;
    "$phase:fill")
        # Not zeros, which take no block of the disk.
        head -c "${TINY_MEBIBYTES}M" <(yes) > "${TARGET_ROOT:-}/large"
        ;;
esac
