"""The networks of the modular-addition experiment as layers: one-layer transformers that add modulo 113."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import load_file

import rotsparse as rs
from rotsparse.evaluation.nulls import random_weights
from rotsparse.layers.base import Layer
from rotsparse.objectives import Objective

P = 113
STAGES = {"ln1": ("pre", "mid"), "ln2": ("mid", "post"), "unembed": ("post", "logits")}
COPIES = {"ln1": 2, "ln2": 1, "unembed": 1}  # the attention reads two positions, a and b, through one rotation


class Attention(Layer):
    """Residual stream at the last position after attention, as a function of those of a and b side by side.

    With `s_hp = q_h·k_hp/√d_head`, `u_hp = O_h v_hp` and attention weights `a_hp = softmax_p(s_hp)`, the output is
    `x_last + Σ_hp a_hp u_hp + b`, and its derivative by the input at position p

        J_p = Σ_h a_hp [O_h V_h + (u_hp - Σ_q a_hq u_hq) (K_hᵀ q_h)ᵀ/√d_head].

    The last position holds the token "=", the same in every example: its query and key are constants.
    """

    value: Float[Array, "h d d"]
    score: Float[Array, "h d"]
    value_bias: Float[Array, "h d"]
    score_bias: Float[Array, "h"]
    last: Float[Array, "d"]
    bias: Float[Array, "d"]

    def __init__(self, w: dict[str, np.ndarray], last: np.ndarray):
        q, k, v, o = (w[f"blocks.0.attn.W_{name}"] for name in "QKVO")
        b_q, b_k, b_v, self.bias = (jnp.asarray(w[f"blocks.0.attn.b_{name}"]) for name in "QKVO")
        query = (np.einsum("d,hdk->hk", last, q) + b_q) / np.sqrt(q.shape[-1])
        self.value = jnp.einsum("hdk,hke->hed", v, o)
        self.value_bias = jnp.einsum("hk,hke->he", b_v, o)
        self.score = jnp.einsum("hdk,hk->hd", k, query)
        self.score_bias = jnp.einsum("hk,hk->h", b_k, query)
        self.last = jnp.asarray(last)

    @property
    def d_in(self) -> int:
        return 2 * len(self.last)

    @property
    def d_out(self) -> int:
        return len(self.last)

    def _attend(self, x):
        """Attention weights `[..., p, h]` and values `[..., p, h, d]` of the three positions."""
        positions = x.reshape(*x.shape[:-1], 2, self.d_out)
        last = jnp.broadcast_to(self.last, (*x.shape[:-1], 1, self.d_out))
        positions = jnp.concatenate([positions, last], axis=-2)
        weights = jax.nn.softmax(positions @ self.score.T + self.score_bias, axis=-2)
        return weights, jnp.einsum("...pd,hed->...phe", positions, self.value) + self.value_bias

    def __call__(self, x):
        weights, values = self._attend(x)
        return self.last + self.bias + jnp.einsum("...ph,...phe->...e", weights, values)

    def jacobian(self, x, r_in=None, r_out=None):
        r_in = jnp.eye(self.d_in, dtype=x.dtype) if r_in is None else r_in
        r_out = jnp.eye(self.d_out, dtype=x.dtype) if r_out is None else r_out
        weights, values = self._attend(x)
        centred = (values - jnp.einsum("nph,nphe->nhe", weights, values)[:, None]) @ r_out.T
        z = 0.0
        for p, r in enumerate(jnp.split(r_in, 2, axis=1)):
            a = weights[:, p]
            z += jnp.einsum("nh,hoi->noi", a, r_out @ self.value @ r.T)
            z += jnp.einsum("nh,nho,hi->noi", a, centred[:, p], self.score @ r.T)
        return z

    def rotate(self, r_in, r_out):
        raise NotImplementedError("this experiment folds nothing")

    def redrawn(self, key) -> "Attention":
        """Values and scores redrawn as `random_weights` does it."""

        def normal(k, w):
            return jnp.sqrt(jnp.mean(jnp.square(w))) * jax.random.normal(k, w.shape)

        key_value, key_score = jax.random.split(key)
        new = normal(key_value, self.value), normal(key_score, self.score)
        return eqx.tree_at(lambda layer: (layer.value, layer.score), self, new)


class Copies(Objective):
    """An objective whose space `space` consists of `copies` vectors side by side that share one rotation R: the inner
    rotation is `diag(R, …, R)`, and the relative gradient of R the sum of the inner one's diagonal blocks."""

    inner: Objective
    space: str = eqx.field(static=True)
    copies: int = eqx.field(static=True)

    @property
    def spaces(self):
        return self.inner.spaces | {self.space: self.inner.spaces[self.space] // self.copies}

    @property
    def examples(self):
        return self.inner.examples

    def with_examples(self, examples):
        return Copies(self.inner.with_examples(examples), self.space, self.copies)

    def _blocks(self, bases):
        r = bases[self.space]
        return bases | {self.space: jnp.kron(jnp.eye(self.copies, dtype=r.dtype), r)}

    def value(self, bases):
        return self.inner.value(self._blocks(bases))

    def value_and_grad(self, bases):
        value, grads = self.inner.value_and_grad(self._blocks(bases))
        d = bases[self.space].shape[0]
        blocks = grads[self.space].reshape(self.copies, d, self.copies, d)
        return value, grads | {self.space: jnp.einsum("cicj->ij", blocks)}


class Network:
    """One trained network: its stages as layers, the activations of every pair (a, b), and the split of the pairs."""

    def __init__(self, path: Path, seed: int):
        w = load_file(path)
        embed, position = w["embed.W_E"], w["pos_embed.W_pos"]
        a, b = np.divmod(np.arange(P * P), P)
        mlp, t = "blocks.0.mlp.", np.ascontiguousarray
        self.layers: dict[str, Layer] = {
            "ln1": Attention(w, embed[P] + position[2]),
            "ln2": rs.MLP(
                t(w[mlp + "W_in"].T),
                w[mlp + "b_in"],
                t(w[mlp + "W_out"].T),
                w[mlp + "b_out"],
                activation="relu",
                skip=True,
            ),
            "unembed": rs.Dense(t(w["unembed.W_U"].T), w["unembed.b_U"], activation="identity"),
        }
        self.labels = (a + b) % P
        x = jnp.concatenate([embed[a] + position[0], embed[b] + position[1]], axis=1)
        self.inputs: dict[str, Array | np.ndarray] = {}
        for stage, layer in self.layers.items():
            self.inputs[stage], x = x, layer(x)
        self.correct = float(np.mean(np.argmax(x, axis=1) == self.labels))
        order = np.random.default_rng(seed).permutation(P * P)
        self.train, self.test = np.split(order, [int(0.3 * P * P)])

    def with_random_weights(self, stage: str, *, key) -> "Network":
        """The same network with one stage's weights redrawn: what enters it is the same, what leaves it is not."""
        new, layer = copy.copy(self), self.layers[stage]
        null = layer.redrawn(key) if isinstance(layer, Attention) else random_weights(layer, key=key)
        new.layers, new.inputs = {**self.layers, stage: null}, dict(self.inputs)
        later = list(STAGES)[list(STAGES).index(stage) + 1 :]
        x = new.inputs[stage]
        for before, after in zip([stage, *later], later, strict=False):
            new.inputs[after] = x = new.layers[before](x)
        return new

    def with_whitened_inputs(self, frame: "Frame") -> "Network":
        """The same network with the MLP's input in units of the standard deviations of its principal components, `z =
        Λ^-½ P x`: modes that are uncorrelated, as Fourier modes over all pairs are, are orthogonal directions of z and
        need not be of x. (Variances below 1e-4 of the largest count as that.)"""
        new, layer, x = copy.copy(self), self.layers["ln2"], self.space("mid").astype(np.float64)
        assert isinstance(layer, rs.MLP)
        variance = np.square(x @ frame.axes.T).mean(axis=0)
        deviation = np.sqrt(np.maximum(variance, 1e-4 * variance.max()))
        back = (frame.axes.T * deviation).astype(np.float32)
        new.layers = dict(self.layers)
        new.layers["ln2"] = rs.MLP(
            layer.w_in @ back, layer.b_in, layer.w_out, layer.b_out, activation="relu", skip=back
        )
        z = np.asarray(self.inputs["ln2"], np.float64) @ frame.axes.T / deviation
        new.inputs = {**self.inputs, "ln2": z.astype(np.float32)}
        return new

    def logits(self, stage: str) -> Callable[[Array], Array]:
        """From a stage's output to the logits."""
        later = list(self.layers.values())[list(STAGES).index(stage) + 1 :]

        def run(y):
            for layer in later:
                y = layer(y)
            return jnp.asarray(y)

        return run

    def space(self, name: str) -> Float[np.ndarray, "n d"]:
        """Activations of a space on training pairs, each position centred, positions as examples."""
        stage = next(stage for stage, (space, _) in STAGES.items() if space == name)
        x = np.asarray(self.inputs[stage])[self.train]
        return np.concatenate(np.split(x - x.mean(axis=0), COPIES[stage], axis=1))


@dataclasses.dataclass(frozen=True)
class Frame:
    """Principal axes of a space, of which the first `active` are rotated."""

    axes: Float[np.ndarray, "d d"]
    active: int

    def lift(self, r) -> np.ndarray:
        return np.concatenate([np.asarray(r) @ self.axes[: self.active], self.axes[self.active :]])


def frames(network: Network, energy: float) -> dict[str, Frame]:
    """The active subspace of every space; the logits keep their own axes."""
    found = {
        "logits": Frame(np.eye(network.layers["unembed"].d_out, dtype=np.float32), network.layers["unembed"].d_out)
    }
    for name in ("pre", "mid", "post"):
        x = network.space(name).astype(np.float64)
        variances, axes = np.linalg.eigh(x.T @ x)
        share = np.cumsum(variances[::-1]) / variances.sum()
        found[name] = Frame(axes.T[::-1].astype(np.float32), int(np.searchsorted(share, energy)) + 1)
    return found
