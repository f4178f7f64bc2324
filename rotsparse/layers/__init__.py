"""Layers, each a stage of a network with its Jacobian in closed form; rotations, and folding them into layers."""

from rotsparse.layers.base import Layer as Layer
from rotsparse.layers.function import FunctionLayer as FunctionLayer
from rotsparse.layers.gated import GatedMLP as GatedMLP
from rotsparse.layers.mlp import MLP as MLP
from rotsparse.layers.mlp import Dense as Dense
