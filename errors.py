"""The error that a user can mend."""


class UserError(ValueError):
    """An input that cannot be used. The message is one line: flag or file, what is wrong, what to do."""


def expect(ok, where, message):
    """Raise UserError unless `ok`. where: a flag, a file, or "file:line"."""
    if not ok:
        raise UserError(f"{where}: {message}")


def one_line(error):
    """Return the message of an exception as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
