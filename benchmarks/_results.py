"""What the benchmarks write: their figures, and how these came about."""

import dataclasses
import importlib.metadata
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rotsparse._core.files import check_new_file
from rotsparse.runs.folders import read_json, write_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))

from _start import start as start

PEERS = ("scipy", "pymanopt", "python-picard")

# Options that say where things are or which parts to run, and change no figure.
_ELSEWHERE = {"quick", "out", "figure", "publish", "data", "minilm", "only", "folder", "keep"}


class Results:
    """The JSON file of one benchmark: `config`, `form` ("quick", "full", or "full" with the options that were given),
    `provenance` and `results`.

    To be made before anything is computed. Raises `ValueError` where `config.out` cannot be written to, and where it
    holds results of another form: those of hours are not replaced by those of minutes, and no table mixes them.
    """

    def __init__(self, config: Any):
        from _provenance import plain, provenance

        options, defaults = dataclasses.asdict(config), dataclasses.asdict(type(config)())
        given = [f"{k}={v}" for k, v in options.items() if k not in _ELSEWHERE and v != defaults[k]]
        self.out: Path | None = config.out
        self.form = ", ".join(["quick" if config.quick else "full", *given])
        self.provenance = provenance()
        self.provenance["versions"] |= _peers()
        self._config = plain(config)
        if self.out is None:
            return
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {self.out}: {error.strerror}") from None
        if not os.access(self.out.parent, os.W_OK):
            raise ValueError(f"cannot write to {self.out.parent}")
        if self.out.exists():
            check_new_file(self.out, overwrite=True)
        if self.out.exists() and (form := read(self.out)["form"]) != self.form:
            raise ValueError(f"{self.out} has results of the form '{form}', not '{self.form}': choose another --out")

    def write(self, results: Any) -> None:
        """Write the results so far, atomically; nothing without `out`."""
        if self.out is not None:
            header = {
                "format": "rotsparse benchmark 1",
                "config": self._config,
                "form": self.form,
                "provenance": self.provenance,
            }
            write_json(self.out, header | {"results": results})


def read(path: Path) -> dict[str, Any]:
    """What `Results.write` wrote. Raises `ValueError` where the file is anything else."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"form", "provenance", "results"} <= content.keys():
        raise ValueError(f"{path} does not say how its figures came about: move it away and run its benchmark again")
    return content


def described(provenances: Iterable[dict[str, Any]]) -> str:
    """One sentence about where figures are from; where they are from several machines or commits, all are named."""
    of = list(provenances)
    machines = _distinct(f"{p['cores']} CPU cores" + _device(p["device"]) for p in of)
    commits = _distinct(_short(p["commit"]) for p in of)
    days = sorted({p["began"][:10] for p in of})
    packages = {name: None for p in of for name in p["versions"]}
    versions = {name: _distinct(p["versions"][name] for p in of if name in p["versions"]) for name in packages}
    return (
        f"{'; '.join(machines)}. {' to '.join(dict.fromkeys((days[0], days[-1])))}, "
        f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}; "
        + ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
        + "."
    )


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _device(kind: str) -> str:
    return "" if kind.lower() == "cpu" else f" and {kind}"


def _short(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    number, *changed = commit.split("-", 1)
    return number[:10] + (" with uncommitted changes" if changed else "")


def _peers() -> dict[str, str]:
    """Versions of the libraries that are compared, as far as they are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
