"""Copies of frozen modules."""

import dataclasses
from typing import Any, TypeVar

M = TypeVar("M")


def replace_fields(module: M, **fields: Any) -> M:
    """A copy of a frozen Equinox module with other values in some fields, without its checks. (`eqx.tree_at` cannot put
    an array where `None` was, and `dataclasses.replace` calls `__init__`.)"""
    new = object.__new__(type(module))
    for field in dataclasses.fields(module):  # pyright: ignore[reportArgumentType]
        object.__setattr__(new, field.name, fields.get(field.name, getattr(module, field.name)))
    return new
