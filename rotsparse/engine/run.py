"""`Run`: where a fit writes, what it shows, and on which devices it runs."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from jax.sharding import Mesh

from rotsparse._core.interrupt import StopSignals

# Name of the folder of checkpoints within the folder of a run.
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """How a fit is run, as opposed to what it computes: `find_rotations(..., run=rs.Run("runs/mlp"))`.

    - `folder`: where the fit saves its state (`checkpoints/`) and writes its log (`log.jsonl`); `None`: nowhere. A fit
      whose folder holds checkpoints resumes from the latest intact one, and ends with the same bits as if it had never
      stopped. If the checkpoints belong to other settings or data, it raises `ValueError` and shows the difference. On
      SIGINT (Ctrl-C) and SIGTERM it saves and returns `Result.INTERRUPTED`; without a folder only on SIGINT, and
      SIGTERM ends the process. The latest two checkpoints and the best one are kept.
    - `every_minutes`, `every_steps`: how often the state is saved, besides at an interruption and at the end of every
      stage. `None`: never by the clock, or never by the number of steps.
    - `progress`: show a progress bar. `tensorboard`: also write event files to `tensorboard/` (needs the extra
      `tensorboard`).
    - `mesh`: `device_mesh()` spreads the examples over all devices of all hosts, `device_mesh(restarts=2)` the restarts
      as well. The examples that are drawn do not depend on it.

    Raises `ValueError` for intervals that are not positive.
    """

    folder: str | os.PathLike | None = None
    every_minutes: float | None = 5.0
    every_steps: int | None = None
    progress: bool = False
    tensorboard: bool = False
    mesh: Mesh | None = None
    _stop: StopSignals | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        for name in ("every_steps", "every_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} should be greater than zero (or None), got {value}")

    @classmethod
    def of(cls, run: "Run | str | os.PathLike | None") -> "Run":
        """The run itself; for a path, `Run(path)`."""
        return run if isinstance(run, Run) else cls(run)

    def subrun(self, name: str) -> "Run":
        """The same run for one stage or layer of a larger fit, in its own folder."""
        return self if self.folder is None else dataclasses.replace(self, folder=Path(self.folder) / name)

    def quiet(self) -> "Run":
        """The same run without a progress bar."""
        return dataclasses.replace(self, progress=False)

    @property
    def checkpoints(self) -> Path | None:
        """The folder of checkpoints."""
        return None if self.folder is None else Path(self.folder) / CHECKPOINTS

    @property
    def stopped(self) -> bool:
        """Whether the user, the system or `stop` has asked to stop since `listening` began."""
        return self._stop is not None and self._stop.requested

    def stop(self) -> None:
        """Ask the rest of the run to stop. Has an effect only within a block of `listening`."""
        if self._stop is not None:
            self._stop.requested = True

    @contextlib.contextmanager
    def listening(self) -> Iterator["Run"]:
        """Give this run, and note SIGINT (and SIGTERM, if there is a folder) in its `stopped` for the length of a
        block."""
        if self._stop is not None:
            yield self
            return
        with StopSignals(terminate=self.folder is not None) as stop:
            yield dataclasses.replace(self, _stop=stop)
