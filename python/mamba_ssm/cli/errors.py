"""What a command says instead of a traceback."""


class UsageError(Exception):
    """The arguments do not fit each other, this machine or what is on disk."""
