"""The only exception class of the library. Bad input raises `ValueError`, a missing extra `ImportError`."""


class CheckError(ValueError):
    """A result must not be used: a fold changed the function, or a file differs from what was written."""
