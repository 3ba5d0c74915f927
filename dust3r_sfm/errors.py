"""The two errors that a user can mend: the command line prints their sentence and exits with code 2."""


class InputError(ValueError):
    """The input cannot be used; the message says what was expected, what came and what to do."""


class ReconstructionError(RuntimeError):
    """The input is sound but no scene can be made of it; the message says why and what to try."""
