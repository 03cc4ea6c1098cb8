"""Errors that a user can mend, each in one line."""

import argparse
import sys
from contextlib import suppress


class UserError(ValueError):
    """An input that cannot be used. The message is one line: flag or file, what is wrong, what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong flag without the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def expect(ok, where, message):
    """Raise UserError unless `ok`. where: a flag, a file, or "file:line"."""
    if not ok:
        raise UserError(f"{where}: {message}")


def one_line(error):
    """Return the message of an exception as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def leave(status):
    """Exit. Close standard output first: where it is full or closed, `main` has said so, and Python would repeat it."""
    with suppress(OSError):
        sys.stdout.close()
    sys.exit(status)
