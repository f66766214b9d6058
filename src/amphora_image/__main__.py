# SPDX-License-Identifier: Apache-2.0
"""``python -m amphora_image`` is ``amphora-image``."""

import sys

from amphora_image.cli import main

if __name__ == "__main__":
    sys.exit(main())
