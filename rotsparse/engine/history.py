"""`History`: the course of a fit."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class History:
    """The course of a fit, one row a restart.

    `objective[r, t]` is the objective (on the step's minibatch, if any) before step t. `checked[r, c]` is the objective
    by which rotations are chosen (held-out where there is validation data, otherwise that of all examples), after
    `checked_at[c]` steps; the first column is the start.
    """

    objective: np.ndarray
    checked_at: np.ndarray
    checked: np.ndarray
