"""Bases and metrics in words."""

from rotsparse._core.intervals import Interval

# `gap_closed` is computed by `compare`, which has the random basis and the floor at hand.
HIGHER_IS_SPARSER: dict[str, bool] = {
    "edges_90": False,
    "edges_99": False,
    "edges_99_by_row": False,
    "edges_99_by_column": False,
    "edges_99_without_top": False,
    "fraction_below_0.1_rms": True,
    "small_by_row": True,
    "small_by_column": True,
    "small_without_top": True,
    "hoyer": True,
    "gini": True,
    "participation_ratio": False,
    "top_1_percent_energy": True,
    "top_5_percent_energy": True,
    "gap_closed": True,
}

LABELS: dict[str, str] = {
    "edges_90": "edges@90",
    "edges_99": "edges@99",
    "edges_99_by_row": "edges@99 by row",
    "edges_99_by_column": "edges@99 by column",
    "edges_99_without_top": "edges@99 w/o top",
    "fraction_below_0.1_rms": "<0.1 rms",
    "small_by_row": "small by row",
    "small_by_column": "small by column",
    "small_without_top": "small w/o top",
    "hoyer": "Hoyer",
    "gini": "Gini",
    "participation_ratio": "particip.",
    "top_1_percent_energy": "top 1%",
    "top_5_percent_energy": "top 5%",
    "gap_closed": "gap closed",
}

_BASES = {
    "learned": "learned rotations",
    "haar": "random (Haar)",
    "pca": "PCA",
    "pca_uncentred": "PCA, uncentred",
    "svd_weights": "SVD of weights",
    "svd_mean_jacobian": "SVD of mean Jacobian",
    "svd_mean_jacobian_weighted": "SVD of mean J, weighted",
    "svd_varimax": "SVD of mean J, varimax",
    "sparse_weights": "sparse weights",
    "triangular": "triangular mean Jacobian",
    "jacobian_gram": "Jacobian Gram",
    "ica": "ICA",
    "hadamard": "Hadamard",
}

_METRICS = {
    "fraction_below_0.1_rms": "share below 0.1 rms",
    "participation_ratio": "participation ratio",
    "top_1_percent_energy": "energy of the top 1%",
    "top_5_percent_energy": "energy of the top 5%",
}

_MEANINGS = {
    "edges_90": "entries of the mean squared Jacobian that hold 90% of its sum",
    "edges_99": "entries of the mean squared Jacobian that hold 99% of its sum",
    "edges_99_by_row": "the same where every row keeps 99% of its own sum",
    "edges_99_by_column": "the same where every column keeps 99% of its own sum",
    "edges_99_without_top": "the same of what remains without the strongest 1% of rows and of columns",
    "fraction_below_0.1_rms": "share of the entries of all examples below a tenth of their root mean square",
    "small_by_row": "share below a tenth of the root mean square of their own row; rows without influence do not count",
    "small_by_column": "the same for columns",
    "small_without_top": "share below a tenth of the root mean square of what remains without the strongest 1% of rows "
    "and of columns",
    "hoyer": "Hoyer's sparseness of an example's Jacobian, on average: 0 all entries equal, 1 a single entry",
    "gini": "Gini index of an example's entries, on average: 0 all equal, 1 a single entry",
    "participation_ratio": "effective number of entries of an example, (Σz²)²/Σz⁴, on average; the large ones decide",
    "top_1_percent_energy": "share of Σz² in an example's largest 1% of entries, on average",
    "top_5_percent_energy": "share of Σz² in an example's largest 5% of entries, on average",
    "gap_closed": "how far from random rotations (0) to the floor (1), by the Geman-McClure measure; to reach the "
    "floor one pair of rotations would have to diagonalise every example's Jacobian",
}


CONCENTRATION: dict[str, str] = {
    "row": "top row",
    "column": "top column",
    "entry": "top entry",
    "example": "top example",
}
"""What holds the shares of the energy in `Concentration`."""

CONCENTRATION_MEANING = (
    "share of Σz² over all examples in the strongest row (output direction), column (input direction), entry and "
    "example; where one of them is large, only the metrics by row, by column and without the top speak of the others"
)


def basis_name(basis: str) -> str:
    """The name of a basis in words."""
    return _BASES.get(basis, basis.replace("_", " "))


def metric_name(metric: str) -> str:
    """The name of a metric in words."""
    return _METRICS.get(metric, LABELS[metric])


def metric_meaning(metric: str) -> str:
    """What a metric counts, in one line."""
    return _MEANINGS[metric]


def metric_value(metric: str, value: float) -> str:
    """A metric's value as people write numbers."""
    return f"{value:,.{digits(metric)}f}".replace("-", "−")


def heading(name: str) -> str:
    """A metric's label, with an arrow to where sparser is."""
    return f"{LABELS[name]} {'↑' if HIGHER_IS_SPARSER[name] else '↓'}"


def shown(name: str, m: Interval, *, bold: bool = False) -> str:
    """A metric's value and half the width of its interval, in Markdown."""
    value, half = number(name, m.value), number(name, (m.high - m.low) / 2)
    return f"**{value}** ±{half}" if bold else f"{value} ±{half}"


def number(name: str, value: float) -> str:
    """A metric's value with the digits that it deserves."""
    return f"{value:.{digits(name)}f}"


def digits(name: str) -> int:
    """Whole entries for counts, three decimals for shares."""
    return 0 if name.startswith("edges") else 1 if name == "participation_ratio" else 3
