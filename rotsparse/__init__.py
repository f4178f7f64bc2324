"""rotsparse: rotations of a trained network's activation spaces in which local changes have local effects.

A layer, its inputs, and the rotations that make its per-example Jacobians sparse:

    layer = rs.MLP(w_in, b_in, w_out, b_out, activation="gelu")
    solution = rs.find_rotations(layer, x, key=jax.random.key(0))
    table = rs.compare(layer, x_test, {"learned": solution.rotations, "pca": rs.baselines.pca(layer, x)}, key=key)
    folded = rs.fold(layer, solution.rotations)

Read on in `layers`, `objectives`, `fit`, and one of the `solvers`.
"""

from rotsparse import baselines as baselines
from rotsparse.alignment import amari_distance as amari_distance
from rotsparse.alignment import match as match
from rotsparse.alignment import mean_max_cosine as mean_max_cosine
from rotsparse.basis import find_basis as find_basis
from rotsparse.chain import ChainSolution as ChainSolution
from rotsparse.chain import fit_chain as fit_chain
from rotsparse.checkpoint import Checkpoints as Checkpoints
from rotsparse.compare import Comparison as Comparison
from rotsparse.compare import compare as compare
from rotsparse.driver import minimize as minimize
from rotsparse.fit import find_rotations as find_rotations
from rotsparse.floor import floor as floor
from rotsparse.fold import Folded as Folded
from rotsparse.fold import fold as fold
from rotsparse.layers import MLP as MLP
from rotsparse.layers import Dense as Dense
from rotsparse.layers import FunctionLayer as FunctionLayer
from rotsparse.layers import GatedMLP as GatedMLP
from rotsparse.layers import Layer as Layer
from rotsparse.measures import L4 as L4
from rotsparse.measures import GemanMcClure as GemanMcClure
from rotsparse.measures import Hoyer as Hoyer
from rotsparse.measures import Log as Log
from rotsparse.measures import Measure as Measure
from rotsparse.measures import SmoothedL1 as SmoothedL1
from rotsparse.measures import SmoothedPower as SmoothedPower
from rotsparse.measures import Tanh as Tanh
from rotsparse.measures import TopK as TopK
from rotsparse.measures import Welsch as Welsch
from rotsparse.metrics import evaluate as evaluate
from rotsparse.norms import layer_norm as layer_norm
from rotsparse.norms import rms_norm as rms_norm
from rotsparse.objectives import ActivationSparsity as ActivationSparsity
from rotsparse.objectives import JacobianSparsity as JacobianSparsity
from rotsparse.objectives import WeightedSum as WeightedSum
from rotsparse.pairs import Certificate as Certificate
from rotsparse.pairs import certify as certify
from rotsparse.pairs import pair_search as pair_search
from rotsparse.refine import refine as refine
from rotsparse.rotations import Rotations as Rotations
from rotsparse.run_log import RunLog as RunLog
from rotsparse.sharding import device_mesh as device_mesh
from rotsparse.solution import Result as Result
from rotsparse.solution import Solution as Solution
from rotsparse.solvers import Annealing as Annealing
from rotsparse.solvers import Riemannian as Riemannian
from rotsparse.solvers import Solver as Solver
from rotsparse.solvers.activation import fit_activations as fit_activations
from rotsparse.sources import Source as Source
from rotsparse.sources import open_source as open_source
from rotsparse.statistics import Moments as Moments
from rotsparse.statistics import stream_moments as stream_moments
