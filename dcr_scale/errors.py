"""The one exception whose message is written for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: bad input, a missing file, a setting that cannot work.

    The message is a single line that says what was found, where, and what to do. Launchers print it without a
    traceback and exit with code 2. A bug in this package must never raise it.

    Attributes:
        agreed: whether every rank raises it, so that the first alone has to say it.
    """

    agreed = False


class Preempted(Exception):
    """The run was told to stop and has saved what it had: the same command goes on from there.

    Raised on all ranks together; launchers print the message on rank 0 and exit with code 75.
    """


class OutOfMemory(Exception):
    """A rank's device is full. Raised on that rank alone; launchers print the message there and exit with code 1."""
