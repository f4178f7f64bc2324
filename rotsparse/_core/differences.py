"""In what two runs differ."""

from collections.abc import Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line, "name: 10 then, 20 now", for every setting that differs, or that only one of the two has (`None`
    counts as not there)."""
    absent = "nothing"
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name}: {before.get(name, absent)} then, {now.get(name, absent)} now"
        for name in names
        if before.get(name) != now.get(name)
    ]
