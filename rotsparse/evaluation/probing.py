"""Do single directions of a basis tell what people have names for? Sparse probes, on held-out examples.

For a binary label and k directions: take the k coordinates whose means differ most between the two groups (in standard
deviations, on the training examples), fit a logistic regression on them, and rank held-out examples by it. With k = 1
this is the selectivity of the best single direction (Gurnee et al., "Finding Neurons in a Haystack", 2023).

Any basis of a space has the same information; a basis that is more meaningful needs fewer of its directions. Even a
random basis does so by chance where labels are easy, and a fit may where nothing was learned: so compare with random
rotations, and with the same fit of a network that learned nothing (`evaluation.nulls`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from rotsparse._core.types import AnyArray

SIZES = (1, 2, 5)

# Labels need so many examples of each group, in training and held out.
FEWEST = 10


def sparse_probes(
    z: Float[AnyArray, "n d"],
    labels: Bool[np.ndarray, "n"],
    z_test: Float[AnyArray, "m d"],
    labels_test: Bool[np.ndarray, "m"],
    sizes: Sequence[int] = SIZES,
) -> list[float]:
    """For each number of directions the area under the ROC curve on held-out examples: 1 tells the two groups apart,
    0.5 is chance. Raises `ValueError` for a label with fewer than ten examples in one of the groups."""
    from sklearn.linear_model import LogisticRegression  # here, because it takes half a second to import
    from sklearn.metrics import roc_auc_score

    counts = [int(c) for of in (labels, labels_test) for c in (np.sum(of), np.sum(~of))]
    if min(counts) < FEWEST:
        raise ValueError(f"a label needs {FEWEST} examples in each group: got {counts[:2]}, held out {counts[2:]}")
    z, z_test = np.asarray(z, np.float64), np.asarray(z_test, np.float64)
    spread = z.std(axis=0)
    scale = np.where(spread > 0, spread, 1)
    z, z_test = z / scale, z_test / scale
    order = np.argsort(-np.abs(z[labels].mean(axis=0) - z[~labels].mean(axis=0)), kind="stable")
    areas = []
    for k in sizes:
        chosen = order[:k]
        probe = LogisticRegression(max_iter=1000, class_weight="balanced").fit(z[:, chosen], labels)
        areas.append(float(roc_auc_score(labels_test, probe.decision_function(z_test[:, chosen]))))
    return areas


def probe_table(
    coordinates: Mapping[str, tuple[Float[AnyArray, "n d"], Float[AnyArray, "m d"]]],
    labels: Mapping[str, tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "m"]]],
    sizes: Sequence[int] = SIZES,
) -> dict[str, dict[str, list[float]]]:
    """`sparse_probes` of every basis for every label, by their names: `table[basis][label]`. `coordinates` and
    `labels`: for training, and held out. Labels that are too rare are left out."""
    usable = {
        name: of
        for name, of in labels.items()
        if all(min(int(part.sum()), int((~part).sum())) >= FEWEST for part in of)
    }
    return {
        basis: {name: sparse_probes(z, of[0], z_test, of[1], sizes) for name, of in usable.items()}
        for basis, (z, z_test) in coordinates.items()
    }
