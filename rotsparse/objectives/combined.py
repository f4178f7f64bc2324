"""Objectives that combine others: weighted sums, and objectives with some rotations held fixed."""

import equinox as eqx
import jax
import jax.numpy as jnp

from rotsparse._core.modules import replace_fields
from rotsparse.objectives.base import Bases, Objective, add_grads


class WeightedSum(Objective):
    """`Σ_k w_k F_k`. Each term has its own spaces; terms that name the same space share its rotation.

    Raises `ValueError` for no terms, another number of weights, or a space that has different dimensions in two terms.
    """

    terms: tuple[Objective, ...]
    weights: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, terms, weights=None):
        self.terms = tuple(terms)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.terms)
        if not self.terms or len(self.weights) != len(self.terms):
            raise ValueError(
                f"expected one weight for each term, got {len(self.terms)} terms, {len(self.weights)} weights"
            )
        _ = self.spaces

    @property
    def spaces(self):
        spaces: dict[str, int] = {}
        for term in self.terms:
            for name, d in term.spaces.items():
                if spaces.setdefault(name, d) != d:
                    raise ValueError(f"space {name!r} has dimension {spaces[name]} in one term and {d} in another")
        return spaces

    def value(self, bases):
        values = [w * term.value(bases) for w, term in zip(self.weights, self.terms, strict=True)]
        return jnp.sum(jnp.stack(values))

    def value_and_grad(self, bases):
        total, grads = jnp.zeros(()), {}
        for w, term in zip(self.weights, self.terms, strict=True):
            value, grad = term.value_and_grad(bases)
            total += w * value
            grads = add_grads(grads, jax.tree.map(lambda g, w=w: w * g, grad))
        return total, grads

    @property
    def examples(self):
        return tuple(e for term in self.terms for e in term.examples)

    def with_examples(self, examples):
        terms, rest = [], examples
        for term in self.terms:
            count = len(term.examples)
            terms.append(term.with_examples(rest[:count]))
            rest = rest[count:]
        return replace_fields(self, terms=tuple(terms))

    def split_key(self, key):
        keys = jax.random.split(key, len(self.terms))
        return tuple(k for term, of_term in zip(self.terms, keys, strict=True) for k in term.split_key(of_term))

    def subsampled(self, key, submatrix):
        keys = jax.random.split(key, len(self.terms))
        terms = (term.subsampled(k, submatrix) for term, k in zip(self.terms, keys, strict=True))
        return replace_fields(self, terms=tuple(terms))

    def map_measures(self, function):
        return replace_fields(self, terms=tuple(term.map_measures(function) for term in self.terms))

    def in_full_precision(self):
        return replace_fields(self, terms=tuple(term.in_full_precision() for term in self.terms))


class Held(Objective):
    """An objective with the rotations of some spaces held fixed; methods do not see these spaces."""

    objective: Objective
    held: Bases

    @property
    def spaces(self):
        return {name: d for name, d in self.objective.spaces.items() if name not in self.held}

    def value(self, bases):
        return self.objective.value(bases | self.held)

    def value_and_grad(self, bases):
        value, grads = self.objective.value_and_grad(bases | self.held)
        return value, {name: g for name, g in grads.items() if name not in self.held}

    @property
    def examples(self):
        return self.objective.examples

    def with_examples(self, examples):
        return Held(self.objective.with_examples(examples), self.held)

    def split_key(self, key):
        return self.objective.split_key(key)

    def subsampled(self, key, submatrix):
        return Held(self.objective.subsampled(key, submatrix), self.held)

    def map_measures(self, function):
        return Held(self.objective.map_measures(function), self.held)

    def in_full_precision(self):
        return Held(self.objective.in_full_precision(), self.held)
