"""Solvers: one file each. A solver sees rotations and an objective with relative gradients, and nothing of layers."""

from rotsparse.solvers.annealing import Annealing as Annealing
from rotsparse.solvers.base import Solver as Solver
from rotsparse.solvers.riemannian import Riemannian as Riemannian
