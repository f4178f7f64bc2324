"""Claim: with the large matrix products in tensorfloat32 or bfloat16 a fit ends where one in float32 ends, at ε = 0.1
of the rms entry.

A CPU multiplies float32 in full whatever `precision` says (the script checks that). What a GPU or TPU would do is
emulated: both operands of every product that `precision` governs are rounded to a mantissa of 10 or 7 bits, and summed
in float32. The products of the normalisation and of the orthogonalisation ask for full precision by themselves, and are
left alone. Figures: the relative error of value and gradient of one minibatch objective at a random start and at the
result, and the objective that fits reach, evaluated in float32. Layer: the second one of the network of `rotsparse
demo`, raw Jacobian. Speed is not measured: it takes an accelerator.
"""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _results import Results, start
from jax.extend import core
from rich.console import Console
from rich.table import Table

import rotsparse as rs
from rotsparse._core.orthogonal import haar
from rotsparse.examples import digits
from rotsparse.objectives import JacobianSparsity, Objective
from rotsparse.objectives.base import thinned

MANTISSA = {"highest": None, "tensorfloat32": 10, "bfloat16": 7}


@dataclasses.dataclass
class Config:
    """What low precision of the matrix products costs in accuracy."""

    quick: bool = False
    """Fewer steps and one seed."""
    steps: int = 4000
    """Steps of each fit."""
    seeds: int = 3
    """Fits at each precision and ε."""
    out: Path | None = None
    """A JSON file for the figures."""


class Rounded(Objective):
    """An objective with the operands of its matrix products rounded to `bits` of mantissa."""

    inner: Objective
    bits: int | None

    @property
    def spaces(self):
        return self.inner.spaces

    def value(self, bases):
        return rounded(self.inner.value, self.bits)(bases)

    def value_and_grad(self, bases):
        return rounded(self.inner.value_and_grad, self.bits)(bases)

    @property
    def examples(self):
        return self.inner.examples

    def with_examples(self, examples):
        return Rounded(self.inner.with_examples(examples), self.bits)


def rounded(function, bits: int | None):
    """`function` with the operands of every matrix product rounded, but for those that ask for full precision."""
    if bits is None:
        return function

    def run(argument):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(argument)
        outputs = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(argument), bits)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return run


def evaluate(jaxpr: Any, consts, arguments, bits: int) -> list:
    """The outputs of a jaxpr, its matrix products on rounded operands."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for eqn in jaxpr.eqns:
        inputs = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in ("while", "cond") and "dot_general" in str(eqn):
            raise NotImplementedError(f"products inside {eqn.primitive.name} would not be rounded")
        if eqn.primitive.name == "scan":
            outputs = evaluate_scan(inputs, bits, **eqn.params)
        elif inner is not None:
            outputs = evaluate(inner.jaxpr, inner.consts, inputs, bits)
        else:
            if eqn.primitive.name == "dot_general" and not full(eqn.params["precision"]):
                inputs = [jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits) for x in inputs]
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


def evaluate_scan(inputs, bits: int, *, jaxpr, num_consts, num_carry, length, reverse, **_) -> list:
    """The outputs of a scan: the final carry, and what its steps returned."""
    consts, carry, xs = np.split(np.arange(len(inputs)), [num_consts, num_consts + num_carry])

    def body(carry, x):
        arguments = [*(inputs[i] for i in consts), *carry, *x]
        outputs = evaluate(jaxpr.jaxpr, jaxpr.consts, arguments, bits)
        return outputs[:num_carry], outputs[num_carry:]

    carry, ys = jax.lax.scan(body, [inputs[i] for i in carry], [inputs[i] for i in xs], length, reverse)
    return [*carry, *ys]


def full(precision) -> bool:
    """Whether a product asks for float32 by itself."""
    return precision is not None and all(p == jax.lax.Precision.HIGHEST for p in precision)


def errors(exact: Objective, rough: Objective, bases) -> tuple[float, float]:
    """The relative errors of value and gradient."""
    (value, grads), (rough_value, rough_grads) = (eqx.filter_jit(o.value_and_grad)(bases) for o in (exact, rough))
    difference = optax.tree.sub(grads, rough_grads)
    return abs(float(rough_value / value) - 1), float(optax.tree.norm(difference) / optax.tree.norm(grads))


def main(config: Config) -> None:
    results = Results(config)
    if config.quick:
        config = dataclasses.replace(config, steps=400, seeds=1)
    network = digits.train(0)
    layer, x = network.layers[1], network.layers[0](jnp.asarray(network.train))
    figures: dict[str, Any] = {}
    table = Table("ε", "precision", "random: value", "gradient", "result: value", "gradient", "objective reached")
    for eps in (0.1, 0.01):
        for name, bits in MANTISSA.items():
            exact, low = (
                JacobianSparsity(layer, x, rs.Log(eps), scale_inputs=False, precision=p) for p in ("highest", name)
            )
            bases = {space: haar(jax.random.key(i), d) for i, (space, d) in enumerate(exact.spaces.items())}
            start = {space: jnp.eye(d) for space, d in exact.spaces.items()}
            solutions = [
                rs.minimize(
                    Rounded(low, bits),
                    start,
                    method=rs.Anneal(steps=config.steps),
                    key=jax.random.key(seed),
                    validation=exact,
                ).completed()
                for seed in range(config.seeds)
            ]
            reached = np.array([solution.validation_value for solution in solutions])
            small, small_low = thinned(exact, 256), thinned(low, 256)
            assert float(small_low.value(bases)) == float(small.value(bases)) or jax.default_backend() != "cpu"
            at = [errors(small, Rounded(small_low, bits), b) for b in (bases, solutions[0].bases)]
            figures[f"{eps} {name}"] = {"random": at[0], "result": at[1], "objective": reached.tolist()}
            orthogonal = max(solution.stats["orthogonality_error"] for solution in solutions)
            assert orthogonal < 1e-5, orthogonal
            cells = [f"{error:.1e}" for pair in at for error in pair]
            table.add_row(f"{eps}", name, *cells, f"{reached.min():.4f} to {reached.max():.4f}")
    Console().print(table)
    results.write(figures)


if __name__ == "__main__":
    start(main, Config)
