"""A live progress bar with the objective, the orthogonality error and the time left."""

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """`with Progress(steps) as bar: bar.update(done, objective=…, error=…)`. Prints nothing unless enabled."""

    def __init__(self, steps: int, *, enabled: bool, label: str = "fit"):
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("objective {task.fields[objective]}  ‖RRᵀ-I‖ {task.fields[error]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not enabled,
            transient=False,
        )
        self._task = self._bar.add_task(label, total=steps, objective="…", error="…")

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def update(self, done: int, *, objective: float, error: float) -> None:
        """Set the number of steps done and the numbers shown."""
        self._bar.update(self._task, completed=done, objective=f"{objective:.4f}", error=f"{error:.1e}")
