"""Everything that a fit depends on, as text, so that a run is resumed only with the settings and data it began with.

`describe` walks through the parts of a fit (layers, measures, optax transformations, arrays, functions) and describes
every leaf: numbers by their value, arrays by dtype, shape and a hash, functions by their name, a hash of their code,
and what they close over. (The optimiser `optax.adam(0.1)` is a nest of closures; one of them holds the rate.) Global
variables that a user's function reads are ignored. Names consist of the package and the qualified name, without the
module, and docstrings are ignored, so a fit can be resumed after code was moved or documentation edited.

An object with a method `fingerprint()` describes itself.
"""

import dataclasses
import dis
import enum
import functools
import importlib.metadata
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rotsparse._core.digests import array_digest, digest

# Arrays of at most this many numbers are shown, larger ones hashed.
SHOWN = 4

# Objects nested more deeply are described by their type alone.
DEPTH = 24

# The packages whose version changes the bits of a fit.
PACKAGES = ("rotsparse", "jax", "jaxlib", "optax", "equinox", "numpy")


def fingerprint(**parts: Any) -> dict[str, str]:
    """A description of every part, of the versions of packages, and of global settings of JAX: all that the bits of a
    fit depend on."""
    described = dict(line for name, part in parts.items() for line in describe(part, name))
    versions = {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    settings = {
        name: repr(getattr(jax.config, name))
        for name in ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")
    }
    return described | versions | settings


def devices() -> str:
    """The devices of this process. Results on different devices agree to rounding, not to the bit."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def describe(value: Any, path: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, str]]:
    """Pairs of a path and a text for every leaf of `value`."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum | np.generic | range):
        yield path, repr(value)
        return
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | np.ufunc | np.dtype):
        yield path, getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or repr(value)
        return
    if isinstance(value, np.ndarray | jax.Array):
        yield path, _array(value)
        return
    if id(value) in above or len(above) >= DEPTH:
        yield path, f"({_name(type(value))})"
        return
    inside = functools.partial(_inside, path, (*above, id(value)))
    if callable(getattr(value, "fingerprint", None)):
        yield path, str(value.fingerprint())
    elif isinstance(value, Mapping):
        yield from inside({f"[{k!r}]": v for k, v in sorted(value.items(), key=lambda item: repr(item[0]))})
    elif isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        yield from inside({f".{name}": v for name, v in zip(names, value, strict=True)})
    elif isinstance(value, list | tuple):
        yield f"{path}.length", str(len(value))
        yield from inside({f"[{i}]": v for i, v in enumerate(value)})
    elif isinstance(value, functools.partial):
        yield from inside({"": value.func, ".args": value.args, ".keywords": value.keywords})
    elif isinstance(value, types.MethodType):
        yield from inside({"": value.__func__, ".self": value.__self__})
    elif isinstance(value, types.FunctionType):
        yield path, f"{_name(value)} (code {digest(_code(value.__code__))})"
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        defaults = {"defaults": value.__defaults__, "keyword defaults": value.__kwdefaults__}
        closed = {f".{name}": cell.cell_contents for name, cell in cells if not _empty(cell)}
        yield from inside(closed | {f".({name})": v for name, v in defaults.items() if v})
    elif hasattr(value, "__wrapped__"):  # jitted functions and the like
        yield from inside({"": value.__wrapped__})
    elif dataclasses.is_dataclass(value):  # all Equinox modules are
        yield path, f"{_name(type(value))} (code {digest(_class_code(type(value)))})"
        names = [field.name for field in dataclasses.fields(value)]
        yield from inside({f".{name}": getattr(value, name) for name in names if hasattr(value, name)})
    else:
        yield path, _name(type(value))
        public = {name: v for name, v in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
        yield from inside({f".{name}": v for name, v in public.items()})


def _inside(path: str, above: tuple[int, ...], parts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, part in parts.items():
        yield from describe(part, path + name, above)


def _array(value: np.ndarray | jax.Array) -> str:
    if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{value.dtype} {np.asarray(jax.random.key_data(value)).tolist()}"
    host = np.asarray(value)
    content = str(host.tolist()) if host.size <= SHOWN else array_digest(host)
    return f"{host.dtype}{list(host.shape)} {content}"


def _name(thing: Any) -> str:
    return f"{str(thing.__module__).partition('.')[0]}: {thing.__qualname__}"  # generated functions have no module


def _empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:  # a name that has not been assigned yet
        return True


def _code(code: types.CodeType) -> bytes:
    """The instructions and constants of a function, without file, line numbers and docstrings.

    Instructions refer to constants by index, which a docstring shifts, so the constants themselves are used instead.
    """
    lines = [
        op.opname.encode() + (_constant(op.argval) if op.opcode in dis.hasconst else repr(op.arg).encode())
        for op in dis.get_instructions(code)
        if not (op.opcode in dis.hasconst and isinstance(op.argval, types.CodeType))
    ]
    inner = [_code(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return b"\0".join([*lines, repr(code.co_names).encode(), *inner])


def _class_code(cls: type) -> bytes:
    """The code of a class's methods and properties, including inherited ones except those of Equinox and Python."""
    methods = []
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("equinox", "builtins", "abc", "collections"):
            continue
        for name, member in sorted(vars(base).items()):
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(function, types.FunctionType):
                methods += [name.encode(), _code(function.__code__)]
    return b"\0".join(methods)


def _constant(constant: Any) -> bytes:
    if isinstance(constant, frozenset):  # whose order changes from process to process
        return repr(sorted(map(repr, constant))).encode()
    return repr(constant).encode()
