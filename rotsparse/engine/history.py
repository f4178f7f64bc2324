"""`History`: the course of a fit."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class History:
    """The course of a fit, with one row per restart.

    `objective[r, t]` is the objective (on the step's minibatch, if any) before step t. `checked[r, c]` is the objective
    by which rotations are chosen (on validation data if there are any, otherwise on all examples), after
    `checked_at[c]` steps; the first column is the start.
    """

    objective: np.ndarray
    checked_at: np.ndarray
    checked: np.ndarray
