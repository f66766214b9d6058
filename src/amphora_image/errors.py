# SPDX-License-Identifier: Apache-2.0
"""What can go wrong on the path, one class per exit code; ``cli`` alone turns them into words."""

from __future__ import annotations


class AmphoraImageError(Exception):
    """A failure that is explained to the user without a traceback.

    :param message: what went wrong, with the value and what is allowed.
    :param hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class HostError(AmphoraImageError):
    """The host cannot build: a tool, a privilege, a device or space is missing."""

    exit_code = 2


class BadValue(AmphoraImageError):
    """An option or a variable has a value that is not allowed."""

    exit_code = 3


class CheckFailed(AmphoraImageError):
    """The image breaks a rule."""

    exit_code = 4


class BootFailed(AmphoraImageError):
    """The image did not do in a virtual machine what an amphora must do."""

    exit_code = 5


class Interrupted(BaseException):
    """A signal ended the work; the exit code is 128 and the signal's number.

    Nobody handles it on the way out, but for undoing: it is no failure of what was under way.

    :param signum: 2 (SIGINT) or 15 (SIGTERM), as in :manpage:`signal(7)`.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}; everything started was undone")
        self.exit_code = 128 + signum
