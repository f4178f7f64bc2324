"""The one exception of our own. Bad input is a `ValueError`, a missing extra an `ImportError`."""


class CheckError(ValueError):
    """A check failed whose result must not be used: a fold changed the function, or a file is not what was written."""
