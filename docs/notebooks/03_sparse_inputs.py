# %% [markdown]
# # Sparse inputs
#
# Drop the smallest coordinates of what enters a layer, in three bases, and measure the error of its output. Then put
# the basis into the weights.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import rotsparse as rs
from rotsparse.evaluation.substitution import KeepLargest, substitution
from rotsparse.examples import digits

network = digits.train()
first, second, third = network.layers
x, x_test = np.asarray(first(network.train)), np.asarray(first(network.test))  # what enters the second layer
x, x_val = x[:1200], x[1200:]
layer = rs.MLP(second.w, second.b, third.w, third.b, activation="relu")

# %%
solution = rs.find_basis(x, key=jax.random.key(0), measure=rs.TopK(0.5), validation=x_val)
bases = {
    "neurons": np.eye(layer.d_in, dtype=np.float32),
    "PCA": rs.baselines.pca_uncentred(layer, x).r_in,
    "rotsparse": solution.bases["x"],
}
print(solution.summary())

# %% [markdown]
# The basis was fitted for keeping half of the coordinates. The curve shows other shares, too.

# %%
kept = [8, 12, 16, 20, 24, 28, 32, 40, 48]
figure, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, r in bases.items():
    errors = [substitution(x_test, r, KeepLargest(k), layer=layer).output_error for k in kept]
    ax.semilogy(kept, errors, marker="o", label=name)
    print(name, np.round(errors, 5).tolist())
ax.set(xlabel=f"coordinates kept of {layer.d_in}", ylabel="relative error of the logits")
ax.legend(frameon=False)
figure.savefig("digits_sparse_inputs.png", dpi=120)

# %%
r = solution.bases["x"]
folded = rs.fold(layer, rs.Rotations(r, np.eye(layer.d_out, dtype=r.dtype)), x_test)
logits = folded.layer(KeepLargest(32)(x_test @ r.T))
same = np.mean(np.argmax(logits, axis=1) == np.argmax(layer(x_test), axis=1))
print(f"with half of the inputs zero, {same:.1%} of the predictions stay the same")
