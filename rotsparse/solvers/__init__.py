"""Methods, one per file. A method sees rotations and an objective with its relative gradient; it knows nothing of
layers."""

from rotsparse.solvers.anneal import Anneal as Anneal
from rotsparse.solvers.combine import BestOf as BestOf
from rotsparse.solvers.combine import Each as Each
from rotsparse.solvers.combine import Then as Then
from rotsparse.solvers.combine import WithMeasure as WithMeasure
from rotsparse.solvers.fixed_point import FixedPoint as FixedPoint
from rotsparse.solvers.fixed_point_newton import FixedPointNewton as FixedPointNewton
from rotsparse.solvers.pair_search import PairSearch as PairSearch
from rotsparse.solvers.power_method import PowerMethod as PowerMethod
from rotsparse.solvers.quasi_newton import QuasiNewton as QuasiNewton
from rotsparse.solvers.refine import Refine as Refine
from rotsparse.solvers.riemannian import Riemannian as Riemannian
