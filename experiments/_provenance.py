"""Under which circumstances were these figures made? Experiments and benchmarks write it beside them."""

import dataclasses
import os
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from rotsparse.runs.folders import versions


def provenance() -> dict[str, Any]:
    """Date, commit, machine and versions. To be asked for when a script begins: what it runs is the commit of then."""
    return {
        "began": datetime.now().isoformat(timespec="seconds"),
        "commit": commit(),
        "cores": cores(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def commit() -> str | None:
    """The commit of the working tree, marked where it has uncommitted changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cores() -> int | None:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def plain(config: Any) -> dict[str, Any]:
    """A configuration (a dataclass) as JSON can hold it."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
