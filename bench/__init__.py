# SPDX-License-Identifier: Apache-2.0
"""Three ways to an amphora image, measured side by side on one host; README.rst tells more."""
