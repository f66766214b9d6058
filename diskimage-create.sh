#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Build an amphora image from a checkout; on a fresh machine, install what that needs first.
# All options: diskimage-create.sh --help
set -eu -o pipefail

# shellcheck source=setup.sh
source "$(dirname "$(readlink -f "$0")")/setup.sh"

require_packages run
# What the tests need includes all that a build needs.
is_made dev || require_venv run
exec "$venv/bin/diskimage-create.sh" "$@"
