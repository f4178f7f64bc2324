"""What every experiment needs: data that may be missing, and one `metrics.json` that says how it came about."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotsparse.runs import versions, write_json

DATA = Path(os.environ.get("ROTSPARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
"""Where experiments look for data unless `--data` says otherwise."""


def require(paths: Sequence[Path], source: str) -> None:
    """Stop with exit code 0, visibly, where a file is missing: other experiments can still run. `source` says where to
    get the files."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        print(f"SKIPPED: {', '.join(map(str, missing))} not found. {source} Then pass --data.", file=sys.stderr)
        sys.exit(0)


def write_metrics(out: Path, config: Any, metrics: dict[str, Any]) -> None:
    """`out/config.json` and `out/metrics.json`: the results, with the configuration (a dataclass), the versions and the
    commit that produced them."""
    config = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    write_json(out / "config.json", config)
    write_json(out / "metrics.json", {"config": config, "versions": versions(), "commit": commit(), **metrics})


def commit() -> str | None:
    """The commit of the working tree, marked where it has uncommitted changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
