# %% [markdown]
# # Is the basis real?
#
# A learned basis counts only beyond what the same fit finds in a null: a layer without the structure in question.
# This notebook compares two blocks of a network for handwritten digits, and the single layer between them, with three
# nulls.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import rotsparse as rs
from rotsparse.evaluation.nulls import random_weights
from rotsparse.examples import digits

STEPS, DRAWS = 600, 3

network = digits.train()
first, second, third = network.layers
hidden, hidden_test = np.asarray(first(network.train)), np.asarray(first(network.test))
layers = {
    "pixels to hidden 2": (rs.MLP(first.w, first.b, second.w, second.b), network.train, network.test),
    "hidden 1 to logits": (rs.MLP(second.w, second.b, third.w, third.b), hidden, hidden_test),
    "hidden 1 to hidden 2": (second, hidden, hidden_test),
}

# %% [markdown]
# ## Three nulls
#
# - random weights: every matrix redrawn with its mean square;
# - same spectrum: every matrix with its singular values and random singular vectors;
# - re-paired: the columns of the last matrix in another order, so that each hidden neuron feeds what another one fed.


# %%
def same_spectrum(layer, key):
    new = {}
    for i, (name, w) in enumerate(layer.weights().items()):
        if w.ndim == 2:
            draw = np.asarray(jax.random.normal(jax.random.fold_in(key, i), w.shape))
            u, _, v = np.linalg.svd(draw, full_matrices=False)
            new[name] = (u * np.linalg.svd(np.asarray(w), compute_uv=False)) @ v
    return layer.with_weights(**new)


def repaired(layer, key):
    return layer.with_weights(w_out=layer.w_out[:, np.asarray(jax.random.permutation(key, layer.w_out.shape[1]))])


def small_entries(layer, x, x_test):
    """The share of held-out entries below 0.1 rms after a fit: with one rms for all entries, and with the rms of each
    row; and the share of the energy in the strongest row."""
    r = rs.find_rotations(layer, x, key=jax.random.key(0), method=rs.Anneal(steps=STEPS)).rotations
    scale = np.asarray(r.apply_in(x)).std(axis=0)
    z = np.asarray(layer.jacobian(x_test, np.asarray(r.r_in) * scale[:, None], r.r_out))
    energy = np.square(z).mean(axis=0)
    row_rms = np.sqrt(energy.mean(axis=1))[None, :, None]
    overall, by_row = (np.mean(np.abs(z) < 0.1 * rms) for rms in (np.sqrt(energy.mean()), row_rms))
    return overall, by_row, energy.sum(axis=1).max() / energy.sum()


shares = {}
for name, (layer, x, x_test) in layers.items():
    nulls = {"random weights": lambda key, layer=layer: random_weights(layer, key=key)}
    nulls["same spectrum"] = lambda key, layer=layer: same_spectrum(layer, key)
    if isinstance(layer, rs.MLP):
        nulls["re-paired"] = lambda key, layer=layer: repaired(layer, key)
    shares[name] = {"trained": np.array([small_entries(layer, x, x_test)])}
    for null, draw in nulls.items():
        keys = jax.random.split(jax.random.key(2), DRAWS)
        shares[name][null] = np.array([small_entries(draw(key), x, x_test) for key in keys])
    print(f"{name:22} one rms  row by row  strongest row (means of {DRAWS} draws)")
    for null, values in shares[name].items():
        overall, by_row, top = values.mean(axis=0)
        print(f"  {null:20} {overall:.3f}    {by_row:.3f}     {top:.0%}")

# %% [markdown]
# A layer stands if it lies above all draws of all of its nulls, by both shares. The single ReLU layer does not: closed
# gates are zeros in any network. A share that holds with one rms and not row by row is concentration: one row has much
# of the energy, and the entries of the others are small beside it.

# %%
figure, axes = plt.subplots(2, len(shares), figsize=(9, 4), sharex="col", sharey="row", layout="constrained")
for column, (name, of) in zip(axes.T, shares.items(), strict=True):
    for i, (null, values) in enumerate(of.items()):
        for ax, kind in zip(column, values.T, strict=False):
            ax.scatter([i] * len(kind), kind, color="#d55e00" if null == "trained" else "#0072b2", s=18)
    column[0].set_title(name, fontsize=9)
    column[1].set_xticks(range(len(of)), list(of), rotation=30, ha="right", fontsize=8)
axes[0, 0].set_ylabel("small, one rms")
axes[1, 0].set_ylabel("small, row by row")
figure.savefig("digits_nulls.png", dpi=120)
