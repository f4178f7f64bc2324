"""The record of a running stage: checkpoints, log and progress bar."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from rotsparse.data.devices import is_first_process
from rotsparse.engine._checkpoint import Session
from rotsparse.engine._fingerprint import fingerprint
from rotsparse.engine._progress import Progress
from rotsparse.engine.log import LogWriter
from rotsparse.engine.run import Run


class Record:
    """Used by every loop of a method: `with Record(run, ...) as record: state = record.restored or state; ...`.

    - `config`: everything that the stage depends on, for the fingerprint in its checkpoints.
    - `state`: the first state, a pytree of arrays. `sound`: says what is wrong with a state; an empty text if nothing
      is.
    - `total`, `label`: number of steps and name on the progress bar. `step_of`: the number of steps done in a state.
    """

    def __init__(
        self,
        run: Run,
        *,
        config: dict[str, Any],
        state: Any,
        sound: Callable[[Any], str],
        total: int,
        label: str,
        step_of: Callable[[Any], int],
    ):
        self._stack = contextlib.ExitStack()
        self._session: Session | None = None
        self._writer: LogWriter | None = None
        self.restored: Any | None = None
        self.begun = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if run.checkpoints is not None:
                self._session = Session(
                    run.checkpoints,
                    fingerprint(**config),
                    state,
                    sound,
                    every_steps=run.every_steps,
                    every_minutes=run.every_minutes,
                )
                stack.enter_context(contextlib.closing(self._session))
                self.restored = self._session.restore()
                self.begun = time.perf_counter()
                if is_first_process():
                    done = 0 if self.restored is None else step_of(self.restored)
                    folder = run.checkpoints.parent
                    self._writer = LogWriter(folder, done, tensorboard=run.tensorboard)
                    stack.enter_context(contextlib.closing(self._writer))
            self._bar = stack.enter_context(Progress(total, enabled=run.progress and is_first_process(), label=label))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    @property
    def saves(self) -> bool:
        """Whether there are checkpoints."""
        return self._session is not None

    @property
    def warnings(self) -> list[str]:
        """The warnings about checkpoints that were given."""
        return [] if self._session is None else self._session.warnings

    def due(self, step: int) -> bool:
        """Whether the state should be saved now."""
        return self._session is not None and self._session.due(step)

    def steps_left(self, step: int) -> int | None:
        """The number of steps to the next save by number of steps; `None` if there are no such saves."""
        return None if self._session is None else self._session.steps_left(step)

    def save(self, step: int, state: Any, value: float) -> None:
        """Save the state, if there are checkpoints."""
        if self._session is not None:
            self._session.save(step, state, value)

    def show(self, step: int, *, best: float, error: float, **line: Any) -> None:
        """Update the bar, and add a line to the log."""
        if self._writer is not None:
            self._writer.write(step, orthogonality_error=error, **line)
        self._bar.update(step, objective=best, error=error)
