"""rotsparse: rotations of a trained network's activation spaces in which local changes have local effects.

A layer, its inputs, and the rotations that make its per-example Jacobians sparse:

    layer = rs.MLP(w_in, b_in, w_out, b_out, activation="gelu")
    solution = rs.find_rotations(layer, x, key=jax.random.key(0))
    table = rs.compare(layer, x_test, {"learned": solution.rotations, "pca": rs.baselines.pca(layer, x)}, key=key)
    folded = rs.fold(layer, solution.rotations)

The floors, top to bottom; imports go downward only:

    cli, runs, report, explain        what the command line does, and what is shown of a fit
    torch                             models with sparse inputs in PyTorch; not imported here
    sparse                            inputs of linear maps with most coordinates dropped
    evaluation                        the evidence
    models, examples                  trained networks
    fit                               find_rotations, find_basis, fit_chain, minimize, and their default methods
    solvers                           methods: Anneal, Riemannian, PairSearch, ..., and Then, BestOf, Each
    engine                            the loop of a method, checkpoints, interruption, Solution
    objectives                        what is minimised: measures on Jacobians and activations
    layers, data, _core               layers and their Jacobians; examples; orthogonal matrices, files, checks
"""

import importlib
import typing as _typing

from rotsparse._core.alignment import amari_distance as amari_distance
from rotsparse._core.alignment import match as match
from rotsparse._core.alignment import mean_max_cosine as mean_max_cosine
from rotsparse._core.errors import CheckError as CheckError

# The public API, a floor a paragraph.
from rotsparse.data.devices import device_mesh as device_mesh
from rotsparse.data.moments import Moments as Moments
from rotsparse.data.moments import stream_moments as stream_moments
from rotsparse.data.open import open_source as open_source
from rotsparse.data.scales import winsorised as winsorised
from rotsparse.data.sources import Source as Source
from rotsparse.engine.method import Method as Method
from rotsparse.engine.run import Run as Run
from rotsparse.engine.solution import Certificate as Certificate
from rotsparse.engine.solution import Result as Result
from rotsparse.engine.solution import Solution as Solution
from rotsparse.engine.steps import Stepwise as Stepwise
from rotsparse.evaluation import baselines as baselines
from rotsparse.evaluation.chain import evaluate_chain as evaluate_chain
from rotsparse.evaluation.compare import Comparison as Comparison
from rotsparse.evaluation.compare import compare as compare
from rotsparse.evaluation.metrics import evaluate as evaluate
from rotsparse.evaluation.verdict import against_baselines as against_baselines
from rotsparse.explain.chain_graph import Needed as Needed
from rotsparse.explain.chain_graph import Share as Share
from rotsparse.fit.chain import fit_chain as fit_chain
from rotsparse.fit.chain import layer_rotations as layer_rotations
from rotsparse.fit.default_method import default_basis_method as default_basis_method
from rotsparse.fit.default_method import default_method as default_method
from rotsparse.fit.find_basis import find_basis as find_basis
from rotsparse.fit.find_rotations import find_rotations as find_rotations
from rotsparse.fit.minimize import minimize as minimize
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
from rotsparse.objectives.activation import ActivationSparsity as ActivationSparsity
from rotsparse.objectives.base import Objective as Objective
from rotsparse.objectives.combined import Held as Held
from rotsparse.objectives.combined import WeightedSum as WeightedSum
from rotsparse.objectives.dropped import DroppedError as DroppedError
from rotsparse.objectives.floor import floor as floor
from rotsparse.objectives.jacobian import JacobianSparsity as JacobianSparsity
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
from rotsparse.runs.effects import effects as effects
from rotsparse.runs.graph import graph as graph
from rotsparse.runs.opened import LayerRun as LayerRun
from rotsparse.runs.opened import load_run as load_run
from rotsparse.solvers.anneal import Anneal as Anneal
from rotsparse.solvers.combine import BestOf as BestOf
from rotsparse.solvers.combine import Each as Each
from rotsparse.solvers.combine import Then as Then
from rotsparse.solvers.combine import WithMeasure as WithMeasure
from rotsparse.solvers.fixed_point import FixedPoint as FixedPoint
from rotsparse.solvers.fixed_point_newton import FixedPointNewton as FixedPointNewton
from rotsparse.solvers.hinted import Hinted as Hinted
from rotsparse.solvers.pair_search import PairSearch as PairSearch
from rotsparse.solvers.pair_search import certify as certify
from rotsparse.solvers.power_method import PowerMethod as PowerMethod
from rotsparse.solvers.quasi_newton import QuasiNewton as QuasiNewton
from rotsparse.solvers.refine import Refine as Refine
from rotsparse.solvers.riemannian import Riemannian as Riemannian

__version__ = "0.2.0"

if _typing.TYPE_CHECKING:
    from rotsparse.report import plot as plot


def __getattr__(name: str):
    """`rs.plot` is imported when it is asked for: Matplotlib takes half a second."""
    if name != "plot":
        raise AttributeError(f"module 'rotsparse' has no attribute {name!r}")
    return importlib.import_module("rotsparse.report.plot")
