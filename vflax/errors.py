"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. The message names the file or key, what was expected and what to do.

    Command lines print the message without a traceback and exit with status 1.
    """
