"""Objectives made of objectives: weighted sums, and some rotations held fixed."""

import equinox as eqx
import jax
import jax.numpy as jnp

from rotsparse._core.modules import replace_fields
from rotsparse.objectives.base import Bases, Objective, add_grads


class WeightedSum(Objective):
    """`Σ_k w_k F_k`, each term on its own spaces; terms that name the same space share its rotation."""

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

    def sample(self, key, fetched=None):
        keys = jax.random.split(key, len(self.terms))
        parts = (None,) * len(self.terms) if fetched is None else fetched
        # Terms of other classes need not know of fetched examples.
        given = [() if part is None else (part,) for part in parts]
        terms = tuple(term.sample(k, *part) for term, k, part in zip(self.terms, keys, given, strict=True))
        return replace_fields(self, terms=terms)

    def fetching(self, keys, devices):
        keys = jax.vmap(jax.vmap(lambda key: jax.random.split(key, len(self.terms))))(keys)
        reads = [term.fetching(keys[..., i], devices) for i, term in enumerate(self.terms)]
        return lambda: tuple(read() for read in reads)

    @property
    def fetched_bytes(self):
        return sum(term.fetched_bytes for term in self.terms)

    def spread(self, devices):
        return replace_fields(self, terms=tuple(term.spread(devices) for term in self.terms))

    def thinned(self, examples):
        return replace_fields(self, terms=tuple(term.thinned(examples) for term in self.terms))

    @property
    def work(self):
        return sum(term.work for term in self.terms)

    @property
    def batch_share(self):
        return sum(term.batch_share for term in self.terms) / len(self.terms)

    def with_eps(self, eps):
        return replace_fields(self, terms=tuple(term.with_eps(eps) for term in self.terms))

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


class Held(Objective):
    """An objective with the rotations of some spaces held fixed: the solver does not see them."""

    objective: Objective
    held: Bases

    @property
    def spaces(self):
        return {name: d for name, d in self.objective.spaces.items() if name not in self.held}

    def sample(self, key, fetched=None):
        return Held(self.objective.sample(key, *(() if fetched is None else (fetched,))), self.held)

    @property
    def fetched_bytes(self):
        return self.objective.fetched_bytes

    def fetching(self, keys, devices):
        return self.objective.fetching(keys, devices)

    def spread(self, devices):
        return Held(self.objective.spread(devices), self.held)

    def thinned(self, examples):
        return Held(self.objective.thinned(examples), self.held)

    @property
    def batch_share(self):
        return self.objective.batch_share

    @property
    def work(self):
        return self.objective.work

    def with_eps(self, eps):
        return Held(self.objective.with_eps(eps), self.held)

    def value(self, bases):
        return self.objective.value(bases | self.held)

    def value_and_grad(self, bases):
        value, grads = self.objective.value_and_grad(bases | self.held)
        return value, {name: g for name, g in grads.items() if name not in self.held}
