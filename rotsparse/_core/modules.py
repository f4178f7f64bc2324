"""Copies of frozen modules with some fields replaced."""

import dataclasses
from typing import Any, TypeVar

M = TypeVar("M")


def replace_fields(module: M, **fields: Any) -> M:
    """A copy of a frozen Equinox module with some fields replaced, without running its checks. (`eqx.tree_at` cannot
    replace `None` by an array, and `dataclasses.replace` calls `__init__`.)"""
    new = object.__new__(type(module))
    for field in dataclasses.fields(module):  # pyright: ignore[reportArgumentType]
        object.__setattr__(new, field.name, fields.get(field.name, getattr(module, field.name)))
    return new
