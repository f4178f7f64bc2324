"""The house: packages on floors, imports that only go down, and modules of a size that one can read."""

import ast
import functools
import importlib
import sys
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "rotsparse"
# Top floor first. Packages in one set are on one floor, and do not import each other.
FLOORS = [
    {"cli"},
    {"runs"},
    {"report", "explain", "torch"},
    {"sparse"},
    {"evaluation"},
    {"models", "examples"},
    {"fit"},
    {"solvers"},
    {"engine"},
    {"objectives"},
    {"layers"},
    {"data"},
    {"_core"},
]
MOST_LINES = 400
MOST_LEVELS = 13  # of packages
MOST_MODULES = 19  # in the longest chain of imports


def name_of(file: Path) -> str:
    """`rotsparse.layers.mlp` for that file; a package's `__init__.py` has the package's name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of the package that a module imports, inside of functions and under `if TYPE_CHECKING` as well."""
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            # Of `from a import b`, a module b is what is imported, and else a.
            names = (f"{source}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else source for name in names}
    return frozenset(found & MODULES.keys()) - {module}


def inside() -> list[str]:
    """All modules but the package's own list of what is public."""
    return [module for module in MODULES if module != "rotsparse"]


def floor(module: str) -> int:
    """How many floors are above that of a module."""
    package = module.split(".")[1]
    return next(i for i, packages in enumerate(FLOORS) if package in packages)


def test_every_module_has_a_floor_and_every_floor_a_package():
    packages = {module.split(".")[1] for module in inside()}
    assert packages == set().union(*FLOORS)
    assert all((PACKAGE / package / "__init__.py").is_file() for package in packages)


def test_imports_go_down_or_stay_in_their_package():
    def allowed(module, imported):
        if imported == "rotsparse":  # the list of what is public, which imports everything
            return False
        return imported.split(".")[1] == module.split(".")[1] or floor(imported) > floor(module)

    imports = [(module, imported) for module in inside() for imported in imports_of(module)]
    assert [f"{a} imports {b}" for a, b in imports if not allowed(a, b)] == []


def test_the_import_graph_was_read():
    """Of a few modules, what they import is known: without it the tests above would pass on an empty graph."""
    assert "rotsparse.layers.base" in imports_of("rotsparse.layers.mlp")
    assert "rotsparse.cli.commands" in imports_of("rotsparse.cli.main")
    assert "rotsparse.report.write" in imports_of("rotsparse.runs.layer_run"), "imported inside of a function"
    assert sum(len(imports_of(module)) for module in MODULES) > 2 * len(MODULES)


def cycles() -> list[list[str]]:
    """Each cycle of imports that a depth-first walk closes, as the modules on it."""
    found, done, path = [], set(), []

    def visit(module):
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            path.append(module)
            for imported in sorted(imports_of(module)):
                visit(imported)
            done.add(path.pop())

    for module in MODULES:
        visit(module)
    return found


def test_no_module_imports_itself_through_others():
    assert [" -> ".join(cycle) for cycle in cycles()] == []


@functools.cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports that begins with a module."""
    return (module, *max((chain(imported) for imported in imports_of(module)), key=len, default=()))


def test_few_levels_of_imports():
    """Packages: as many levels as there are floors. Modules: as few as floors of several modules allow."""
    assert len(FLOORS) <= MOST_LEVELS
    longest = max((chain(module) for module in inside()), key=len)
    print(f"{len(longest)} levels: " + " -> ".join(name.removeprefix("rotsparse.") for name in longest))
    assert len(longest) <= MOST_MODULES


def test_no_module_is_too_long():
    lines = {module: file.read_text(encoding="utf-8").count("\n") for module, file in MODULES.items()}
    assert {module: n for module, n in lines.items() if n > MOST_LINES} == {}, "split them by what they are about"


def hidden_modules(package: str) -> set[str]:
    """The public modules of a package whose name is that of something else once the package is imported."""
    content = vars(importlib.import_module(package))
    return {
        module
        for module in MODULES
        if module.rpartition(".")[0] == package
        and not module.rpartition(".")[2].startswith("_")
        and content.get(module.rpartition(".")[2], sys.modules.get(module)) is not sys.modules.get(module)
    }


PACKAGES = sorted(module for module, file in MODULES.items() if file.name == "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_hides_a_module(package):
    """`import rotsparse.x` gives the module x, and not a function of that name."""
    assert hidden_modules(package) == set()


def test_private_modules_stay_in_their_package():
    """But `_core`, which is private to all of rotsparse. The list of what is public may take names from anywhere."""

    def allowed(module, imported):
        package, _, name = imported.rpartition(".")
        return not name.startswith("_") or name == "_core" or module == package or module.startswith(f"{package}.")

    imports = [(module, imported) for module in inside() for imported in imports_of(module)]
    assert [f"{a} imports {b}" for a, b in imports if not allowed(a, b)] == []
