"""rotsparse: rotations of a trained network's activation spaces in which local changes have local effects.

A layer, its inputs, and the rotations that make its per-example Jacobians sparse:

    layer = rs.MLP(w_in, b_in, w_out, b_out, activation="gelu")
    solution = rs.find_rotations(layer, x, key=jax.random.key(0))
    table = rs.compare(layer, x_test, {"learned": solution.rotations, "pca": rs.baselines.pca(layer, x)}, key=key)
    folded = rs.fold(layer, solution.rotations)

Read on in `layers`, `objectives`, `fit`, and one of the `solvers`.
"""

from rotsparse._core.alignment import amari_distance as amari_distance
from rotsparse._core.alignment import match as match
from rotsparse._core.alignment import mean_max_cosine as mean_max_cosine
from rotsparse.data.devices import device_mesh as device_mesh
from rotsparse.data.moments import Moments as Moments
from rotsparse.data.moments import stream_moments as stream_moments
from rotsparse.data.open import open_source as open_source
from rotsparse.data.sources import Source as Source
from rotsparse.evaluation import baselines as baselines
from rotsparse.evaluation.compare import Comparison as Comparison
from rotsparse.evaluation.compare import compare as compare
from rotsparse.evaluation.metrics import evaluate as evaluate
from rotsparse.fit._checkpoint import Checkpoints as Checkpoints
from rotsparse.fit._log import RunLog as RunLog
from rotsparse.fit.chain import ChainSolution as ChainSolution
from rotsparse.fit.chain import fit_chain as fit_chain
from rotsparse.fit.find_basis import find_basis as find_basis
from rotsparse.fit.find_rotations import find_rotations as find_rotations
from rotsparse.fit.minimize import minimize as minimize
from rotsparse.fit.solution import Result as Result
from rotsparse.fit.solution import Solution as Solution
from rotsparse.layers.base import Layer as Layer
from rotsparse.layers.fold import Folded as Folded
from rotsparse.layers.fold import fold as fold
from rotsparse.layers.function import FunctionLayer as FunctionLayer
from rotsparse.layers.gated import GatedMLP as GatedMLP
from rotsparse.layers.mlp import MLP as MLP
from rotsparse.layers.mlp import Dense as Dense
from rotsparse.layers.norms import layer_norm as layer_norm
from rotsparse.layers.norms import rms_norm as rms_norm
from rotsparse.layers.rotations import Rotations as Rotations
from rotsparse.objectives import ActivationSparsity as ActivationSparsity
from rotsparse.objectives import JacobianSparsity as JacobianSparsity
from rotsparse.objectives import WeightedSum as WeightedSum
from rotsparse.objectives.floor import floor as floor
from rotsparse.objectives.measures import L4 as L4
from rotsparse.objectives.measures import GemanMcClure as GemanMcClure
from rotsparse.objectives.measures import Hoyer as Hoyer
from rotsparse.objectives.measures import Log as Log
from rotsparse.objectives.measures import Measure as Measure
from rotsparse.objectives.measures import SmoothedL1 as SmoothedL1
from rotsparse.objectives.measures import SmoothedPower as SmoothedPower
from rotsparse.objectives.measures import Tanh as Tanh
from rotsparse.objectives.measures import TopK as TopK
from rotsparse.objectives.measures import Welsch as Welsch
from rotsparse.solvers import Annealing as Annealing
from rotsparse.solvers import Riemannian as Riemannian
from rotsparse.solvers import Solver as Solver
from rotsparse.solvers.fixed_point_newton import fit_activations as fit_activations
from rotsparse.solvers.pair_search import Certificate as Certificate
from rotsparse.solvers.pair_search import certify as certify
from rotsparse.solvers.pair_search import pair_search as pair_search
from rotsparse.solvers.refine import refine as refine

__version__ = "0.2.0"
