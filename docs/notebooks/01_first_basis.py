# %% [markdown]
# # A first basis
#
# Fit rotations of one block of a network for handwritten digits, look at its Jacobians and at its directions, and
# fold the rotations into the weights. Everything here comes with scikit-learn; nothing is downloaded.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rotsparse as rs
from rotsparse.evaluation.ablation import EdgeAblation
from rotsparse.examples import digits

network = digits.train()
first, second, third = network.layers
x, x_test = np.asarray(first(network.train)), np.asarray(first(network.test))
print(f"accuracy on held-out images: {network.accuracy:.3f}")

# %% [markdown]
# The layer is the block from hidden layer 1 to the ten logits, `third.w · relu(second.w · x + second.b)`. Its inputs
# and outputs can rotate; the hidden neurons inside cannot, because of the nonlinearity.

# %%
layer = rs.MLP(second.w, second.b, third.w, third.b, activation="relu")
solution = rs.find_rotations(layer, x, key=jax.random.key(0), method=rs.Anneal(steps=2000), restarts=2)
print(solution.summary())

# %% [markdown]
# ## Sparser than other bases?
#
# All metrics are measured on held-out images, and none of them is the objective.

# %%
bases = {"learned": solution.rotations} | rs.baselines.all_baselines(layer, x, key=jax.random.key(1))
table = rs.compare(layer, x_test, bases, key=jax.random.key(2))
print(table.markdown())
print(rs.against_baselines(table))

# %% [markdown]
# ## The Jacobians
#
# Mean absolute Jacobian over the held-out images, inputs in units of their standard deviation. The palest
# entries are below a tenth of the root mean square.

# %%
figure, axes = plt.subplots(3, 1, figsize=(8, 4.6), layout="constrained")
for ax, name in zip(axes, ["neurons", "pca", "learned"], strict=True):
    r = bases[name]
    scale = r.apply_in(x).std(axis=0)
    z = np.asarray(layer.jacobian(x_test, np.asarray(r.r_in) * np.asarray(scale)[:, None], r.r_out))
    mean = np.abs(z).mean(axis=0) / np.sqrt(np.mean(np.square(z)))
    rows, columns = (np.argsort(-np.square(mean).sum(axis=side)) for side in (1, 0))  # the strongest first
    image = ax.imshow(np.maximum(mean[rows][:, columns], 0.1), norm="log", vmin=0.1, vmax=10, cmap="magma_r")
    ax.set(ylabel=name, xticks=[], yticks=[])
axes[-1].set_xlabel("input directions (columns), output directions (rows)")
figure.colorbar(image, ax=axes, label="mean |Jacobian|, rms = 1")
figure.savefig("digits_block.png", dpi=120)

# %% [markdown]
# ## The strongest directions
#
# Sort input directions by influence, and show the mean coordinate of each digit. Directions that both starts found have
# a star.

# %%
labels = load_digits(return_X_y=True)[1]
_, y_test = train_test_split(labels, test_size=0.2, random_state=0, stratify=labels)

edges = EdgeAblation(layer, x, solution.rotations)
influence = edges.importance.sum(axis=0) / edges.importance.sum()
again = solution.agreement()["in"].min(axis=0) > 0.99
order = np.argsort(-influence)
print(f"{again.sum()} of {len(again)} input directions are found again,")
print(f"with {influence[again].sum():.0%} of the influence")

z = np.asarray(solution.rotations.apply_in(x_test))
figure, axes = plt.subplots(2, 4, figsize=(9, 3.6), sharex=True, layout="constrained")
for ax, i in zip(axes.flat, order, strict=False):
    ax.bar(range(10), [z[y_test == digit, i].mean() for digit in range(10)], color="#0072b2")
    ax.set_title(f"{influence[i]:.0%} of the influence" + (" *" if again[i] else ""), fontsize=8)
    ax.set_xticks(range(10))
figure.supxlabel("digit", fontsize=9)
figure.savefig("digits_directions.png", dpi=120)

# %% [markdown]
# ## Fold
#
# The rotated weights compute the same function in the new coordinates.

# %%
folded = rs.fold(layer, solution.rotations, x_test)
print(f"outputs have rms {folded.scale:.2g}; the largest difference is {folded.error:.1e}")
