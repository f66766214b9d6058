# SPDX-License-Identifier: Apache-2.0
"""Build, inspect and prove images for OpenStack Octavia."""
