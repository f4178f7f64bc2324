"""A transformer that learned to add modulo 113: how few edges does each stage need, and what are its directions?

The networks are those of Bushnaq et al., "The Local Interaction Basis" (LIB, 2024): one layer, four heads, no norms,
read at the last position. Three stages connect four spaces:

    pre (embeddings of a and b) --attention--> mid --MLP with its skip--> post --unembedding--> logits

Edges needed: the fewest edges, ranked by mean squared Jacobian times input variance, with which the accuracy on pairs
outside a 30% training fraction falls by at most 0.001; cut inputs are held at their mean. Rotations are fitted, and
chosen among restarts by their held-out objective, within the training fraction; nothing is chosen by the number of
edges.

The MLP stage is measured twice more. With whitened inputs: the directions of LIB are not orthogonal, and need not be,
since the inverse of any matrix folds into the weights. Ranked by what is read, too: an edge into an output that the
unembedding does not read cannot matter (LIB scales its outputs by their gradient to the same end).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import _common
import jax
import jax.numpy as jnp
import numpy as np
from _modular_addition import COPIES, STAGES, Copies, Frame, Network, P, frames
from jaxtyping import Float
from matplotlib.figure import Figure

import rotsparse as rs
from rotsparse._core.intervals import Interval, bootstrap_counts, bootstrap_interval
from rotsparse.evaluation.ablation import EdgeAblation, accuracy
from rotsparse.evaluation.control import Control
from rotsparse.evaluation.names import basis_name
from rotsparse.evaluation.verdict import SHARE, structure
from rotsparse.layers.jacobians import jacobian_moments
from rotsparse.layers.subspace import Subspace
from rotsparse.objectives import Held, JacobianSparsity, Objective

Spaces = dict[str, Any]
"""A rotation for every space, by name."""

EXACT = ("learned", "learned_joint", "pca")
"""Whose edges are counted on all held-out pairs, in the MLP stage. The rest is counted on fewer: each look at a basis
that needs many edges calls a stage once for every set of inputs that an output keeps."""
FEWER, FEW = 1000, 500

RANKINGS = {"Jacobian": False, "Jacobian, read": True}
"""How edges are ranked: whether by what the unembedding reads of their output, too (of the MLP stage only)."""

SOURCE = (
    "They are the checkpoints of ApolloResearch/rib (MIT), rib_scripts/train_modular_arithmetic/sample_checkpoints, "
    "converted to safetensors with their names kept."
)


@dataclasses.dataclass(frozen=True)
class Config(_common.Options):
    """Edges that each stage of a modular-addition transformer needs, in every basis."""

    data: Path = _common.DATA
    """The folder with modular_addition/seed*.safetensors (and published.json)."""
    checkpoint: Path | None = None
    """One such file instead; published.json is looked for beside it."""
    quick: bool = False
    """The first network only, fewer restarts, steps and pairs: a few minutes."""
    eps: float = 0.1
    """Scale of the log measure."""
    active_subspace: float = 0.999
    """Directions outside of this share of a space's variance are not rotated."""
    tolerance: float = 0.001
    restarts: int = 4
    steps: int = 4000
    examples: int = 1900
    """Pairs to fit on, and as many to choose the restart on: together nearly all of the training fraction."""
    keys: int = 3
    """The MLP stage is fitted with so many keys: how far does the number of edges depend on chance?"""


def fit(
    network: Network, stages: list[str], frame: dict[str, Frame], config: Config, *, seed: int | None = None
) -> rs.Solution:
    """Rotations of the spaces around some stages, shared where two stages meet. `seed`: the configuration's unless
    given.

    A stage weighs as much as it has edges, so that what is minimised is a smooth count of all edges together.
    """
    edges = [frame[space_in].active * frame[space_out].active for space_in, space_out in (STAGES[s] for s in stages)]
    weights = [count / sum(edges) for count in edges]

    def objective(rows):
        terms: list[Objective] = []
        for stage in stages:
            layer, (space_in, space_out) = network.layers[stage], STAGES[stage]
            x = network.inputs[stage][rows]
            term = JacobianSparsity(layer, x, rs.Log(config.eps), space_in=space_in, space_out=space_out)
            active = {space: frame[space].axes[: frame[space].active] for space in (space_in, space_out)}
            frame_in = np.kron(np.eye(COPIES[stage], dtype=np.float32), active[space_in])
            term = term.within(Subspace(layer, jnp.asarray(frame_in), jnp.asarray(active[space_out])))
            terms.append(Copies(term, space_in, COPIES[stage]) if COPIES[stage] > 1 else term)
        total = rs.WeightedSum(terms, weights)
        return Held(total, {"logits": jnp.eye(frame["logits"].active)}) if "unembed" in stages else total

    n = config.examples
    fitted = objective(network.train[:n])
    start = {name: jnp.eye(d) for name, d in fitted.spaces.items()}
    return rs.minimize(
        fitted,
        start,
        method=rs.Anneal(steps=config.steps),
        key=jax.random.key(config.seed if seed is None else seed),
        restarts=config.restarts,
        validation=objective(network.train[n : 2 * n]),
    ).completed()


def all_bases(network: Network, config: Config) -> tuple[dict[str, dict[str, Spaces]], dict[str, Any]]:
    """`bases[method][stage]`: the rotations of the stage's two spaces; and what the fits say of themselves."""
    frame = frames(network, config.active_subspace)
    logits = {"logits": np.eye(frame["logits"].active, dtype=np.float32)}
    spaces: dict[str, Spaces] = {"pca": {}, "ica": {}, "haar": {}, "neurons": {}}
    for i, name in enumerate(("pre", "mid", "post")):
        x = network.space(name)
        view = rs.Dense(np.eye(x.shape[1], dtype=np.float32), activation="identity")
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        for method, rotations in {
            "pca": rs.baselines.pca(view, x),
            "ica": rs.baselines.ica(view, x, seed=config.seed),
            "haar": rs.baselines.haar(view, x, key=key),
            "neurons": rs.baselines.neurons(view, x),
        }.items():
            spaces[method][name] = rotations.r_in
    joint = fit(network, list(STAGES), frame, config)
    spaces["learned_joint"] = {name: frame[name].lift(r) for name, r in joint.bases.items()}
    bases = {method: {stage: {**by_space, **logits} for stage in STAGES} for method, by_space in spaces.items()}

    fits = {"joint": joint}
    for stage, (space_in, space_out) in STAGES.items():
        fits[stage] = fit(network, [stage], frame, config)
        lifted = {name: frame[name].lift(r) for name, r in fits[stage].bases.items()}
        bases.setdefault("learned", {})[stage] = lifted | logits
        for method, (r_in, r_out) in svd_bases(network, stage).items():
            r_out = logits["logits"] if space_out == "logits" else r_out
            bases.setdefault(method, {})[stage] = {space_in: r_in, space_out: r_out}
    described = {
        name: {
            "held_out_objective": solution.validation_value,
            "all_restarts": solution.candidate_values,
            "agreement": {space: cosines.mean(axis=0) for space, cosines in solution.agreement().items()},
            "seconds": solution.stats["seconds"],
        }
        for name, solution in fits.items()
    }
    described = {"fits": described, "active": {name: f.active for name, f in frame.items()}}
    return bases, described | {"controls": controls(network, fits, frame, config)}


def svd_bases(network: Network, stage: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Singular vectors of the mean Jacobian, plain and weighted by the inputs' covariance; positions are averaged."""
    mean = jacobian_moments(network.layers[stage], network.inputs[stage][network.train[:1000]]).mean
    mean = sum(np.split(mean, COPIES[stage], axis=1)) / COPIES[stage]
    x = network.space(STAGES[stage][0]).astype(np.float64)
    variances, axes = np.linalg.eigh(x.T @ x / len(x))
    root = (axes * np.sqrt(np.maximum(variances, 0))) @ axes.T
    found = {}
    for method, matrix in {"svd_mean_jacobian": mean, "svd_mean_jacobian_weighted": mean @ root}.items():
        left, _, right = np.linalg.svd(matrix)
        found[method] = (right.astype(np.float32), left.T.astype(np.float32))
    return found


def edges_needed(network: Network, bases: dict[str, dict[str, Spaces]], config: Config) -> dict[str, dict[str, int]]:
    """`[stage][method]`."""
    found: dict[str, dict[str, int]] = {stage: {} for stage in STAGES}
    for stage, (space_in, space_out) in STAGES.items():
        for method, by_stage in bases.items():
            rotations = rs.Rotations(by_stage[stage][space_in], by_stage[stage][space_out])
            pairs = FEW if method not in EXACT else FEWER if config.quick or stage != "ln2" else None
            found[stage][method] = count_edges(network, stage, rotations, config, pairs=pairs)
    return found


def count_edges(
    network: Network,
    stage: str,
    rotations: rs.Rotations,
    config: Config,
    *,
    pairs: int | None = None,
    ranking: str = "Jacobian",
) -> int:
    """The fewest edges of one stage, on so many of the held-out pairs (default: all)."""
    test = network.test[:pairs]
    score = accuracy(network.logits(stage), network.labels[test])
    x = network.inputs[stage][network.train[:1000]]
    reader = None
    if RANKINGS[ranking]:
        read = np.asarray(network.layers["unembed"].weights()["w"])
        reader = read - read.mean(axis=0)  # what moves all logits alike changes no prediction
    ablation = EdgeAblation(network.layers[stage], x, rotations, reader=reader, copies=COPIES[stage])
    inputs, near = network.inputs[stage][test], None
    if len(test) > FEW:
        few = accuracy(network.logits(stage), network.labels[test[:FEW]])
        near = ablation.fewest(inputs[:FEW], few, config.tolerance)
    return ablation.fewest(inputs, score, config.tolerance, near=near)


def mlp_edges(network: Network, bases: dict[str, dict[str, Spaces]], config: Config) -> dict[str, dict[str, list[int]]]:
    """`[basis][ranking]`: edges that the MLP stage needs, of fits with several keys, the experiment's own first."""
    frame, pairs = frames(network, config.active_subspace), FEWER if config.quick else None
    whitened = network.with_whitened_inputs(frame["mid"])
    principal = frame | {"mid": Frame(np.eye(len(frame["mid"].axes), dtype=np.float32), frame["mid"].active)}
    learned, pca = (rs.Rotations(*(bases[name]["ln2"][s] for s in STAGES["ln2"])) for name in ("learned", "pca"))

    def found(network: Network, frame: dict[str, Frame], seed: int) -> rs.Rotations:
        fitted = fit(network, ["ln2"], frame, config, seed=seed).bases
        return rs.Rotations(*(frame[space].lift(fitted[space]) for space in STAGES["ln2"]))

    own, *others = range(config.seed, config.seed + config.keys)
    of = {
        "learned": (network, [learned, *(found(network, frame, seed) for seed in others)]),
        "learned, inputs whitened": (whitened, [found(whitened, principal, seed) for seed in (own, *others)]),
        "PCA": (network, [pca]),
    }
    return {
        name: {
            ranking: [count_edges(network, "ln2", r, config, pairs=pairs, ranking=ranking) for r in rotations]
            for ranking in RANKINGS
        }
        for name, (network, rotations) in of.items()
    }


def fourier(network: Network, space: str, directions: Float[np.ndarray, "k d"]) -> list[dict[str, Any]]:
    """What each direction computes: the Fourier mode of (a, b) that holds most of its coordinate's variance.

    Modes: "a, b" (frequency k of either alone), "a + b" and "a - b", k from 1 to 56; the position of a stands for both.
    """
    stage = next(stage for stage, (name, _) in STAGES.items() if name == space)
    x = np.asarray(network.inputs[stage])[:, : directions.shape[1]]
    power = np.abs(np.fft.fft2((x @ directions.T).T.reshape(-1, P, P))) ** 2
    power[:, 0, 0] = 0
    k = np.arange(1, P // 2 + 1)
    modes = {
        "a, b": power[:, k, 0] + power[:, -k, 0] + power[:, 0, k] + power[:, 0, -k],
        "a + b": power[:, k, k] + power[:, -k, -k],
        "a - b": power[:, k, -k] + power[:, -k, k],
    }
    total = power.sum(axis=(1, 2))
    found = []
    for i in range(len(directions)):
        mode = max(modes, key=lambda name: modes[name][i].max())
        best = int(modes[mode][i].argmax())
        share = float(modes[mode][i, best] / total[i])
        found.append({"mode": mode, "frequency": best + 1, "share": share, "sd": float(np.sqrt(total[i]) / P**2)})
    return found


def controls(network: Network, fits: dict[str, rs.Solution], frame: dict[str, Frame], config: Config) -> dict[str, Any]:
    """Every stage beside the same fit with its weights redrawn, on the same inputs: was its sparsity learned?"""
    result = {}
    for i, stage in enumerate(STAGES):
        null = network.with_random_weights(stage, key=jax.random.fold_in(jax.random.key(config.seed), i))
        null_frame = frames(null, config.active_subspace)
        learned = small_entries(network, stage, fits[stage], frame)
        random = small_entries(null, stage, fit(null, [stage], null_frame, config), null_frame)
        said = structure(Control({SHARE: learned}, {"random weights": ({SHARE: random},)})).headline()
        result[stage] = {"learned": learned._asdict(), "random_weights": random._asdict()}
        result[stage] |= {"conclusion": f"{stage}: {said}"}
    return result


def small_entries(network: Network, stage: str, solution: rs.Solution, frame: dict[str, Frame]) -> Interval:
    """The share of a stage's Jacobian entries (between active directions, inputs scaled by their standard deviations)
    that are below a tenth of the rms, on held-out pairs."""
    r_in, r_out = (
        np.asarray(solution.bases.get(space, np.eye(frame[space].active)), np.float32)
        @ frame[space].axes[: frame[space].active]
        for space in STAGES[stage]
    )
    r_in = np.kron(np.eye(COPIES[stage], dtype=np.float32), r_in)
    x = network.inputs[stage]
    sd = np.std(np.asarray(x[network.train]) @ r_in.T, axis=0)
    z = np.abs(
        np.asarray(network.layers[stage].jacobian(x[network.test[:1000]], jnp.asarray(sd[:, None] * r_in), r_out))
    )
    shares = np.mean(z < 0.1 * np.sqrt(np.mean(np.square(z))), axis=(1, 2))
    counts = bootstrap_counts(len(shares), 200, key=jax.random.key(0))
    return bootstrap_interval(shares.mean(), counts @ shares / len(shares))


def study(path: Path, config: Config, published: dict[str, Any]) -> dict[str, Any]:
    """All measurements of one network."""
    network = Network(path, config.seed)
    bases, described = all_bases(network, config)
    learned = bases["learned"]
    active = described["active"]
    directions = {
        f"{stage}.{space}": fourier(network, space, np.asarray(learned[stage][space])[: active[space]])
        for stage, spaces in STAGES.items()
        for space in spaces
        if space != "logits"
    }
    edges = edges_needed(network, bases, config)
    result = {
        "accuracy": network.correct,
        **described,
        "edges_needed": edges,
        "mlp_edges": mlp_edges(network, bases, config),
        "directions": directions,
    }
    for method, edges in published.items():
        for stage in STAGES:
            result["edges_needed"][stage][f"published_{method}"] = edges[stage]
    return result


def mean_edges(networks: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Edges needed, averaged over the networks, and the sum over the stages."""
    edges = [network["edges_needed"] for network in networks.values()]
    mean = {s: {m: float(np.mean([of[s][m] for of in edges])) for m in edges[0][s]} for s in STAGES}
    return mean | {"sum": {m: sum(mean[s][m] for s in STAGES) for m in mean["ln2"]}}


def table(edges: dict[str, dict[str, float]]) -> str:
    """A Markdown table, fewest edges in total first."""
    methods = sorted(edges["sum"], key=lambda m: edges["sum"][m])
    rows = [f"| {m} | " + " | ".join(f"{edges[s][m]:.1f}" for s in edges) + " |" for m in methods]
    return "\n".join(["| basis | " + " | ".join(edges) + " |", "|---" * (len(edges) + 1) + "|", *rows])


def mlp_row(networks: dict[str, dict[str, Any]], basis: str) -> str:
    """A row of the table of the MLP stage: the mean, and every network's edges, key by key."""
    cells = []
    for ranking in RANKINGS:
        counts = [of["mlp_edges"][basis][ranking] for of in networks.values()]
        cells.append(f"{np.mean(counts):.1f} ({'; '.join(', '.join(map(str, keys)) for keys in counts)})")
    return f"| {basis} | {' | '.join(cells)} |"


def describe(directions: list[dict[str, Any]]) -> str:
    """One line for the directions of a space, strongest first."""
    ordered = sorted(directions, key=lambda d: -d["sd"])
    return ", ".join(f"{d['mode']} k={d['frequency']} ({d['share']:.0%})" for d in ordered)


def report(networks: dict[str, dict[str, Any]], means: dict[str, dict[str, float]], config: Config) -> str:
    pure = [d["share"] > 0.9 for n in networks.values() for d in n["directions"]["ln2.mid"]]
    lines = [
        "# Modular addition: edges that each stage needs",
        "",
        f"Networks: {', '.join(networks)}; accuracy may fall by {config.tolerance}; mean over networks.",
        "",
        table(means),
        "",
        "The MLP stage (ln2), fitted with several keys, by how edges are ranked (wanted: at most 25; LIB 76):",
        "",
        f"| basis | {' | '.join(RANKINGS)} |",
        "|---|---:|---:|",
        *(mlp_row(networks, basis) for basis in next(iter(networks.values()))["mlp_edges"]),
        "",
        f"Of the directions that the fit of ln2 finds in its input, {np.mean(pure):.0%} hold more than 90% of their "
        "variance in one Fourier mode. Modes, strongest direction first:",
        "",
    ]
    for name, network in networks.items():
        lines += [f"- {name}, {where}: {describe(network['directions'][where])}" for where in ("ln2.mid", "ln2.post")]
    lines += ["", "Held-out Jacobian entries below 0.1 rms, against random weights on the same inputs:", ""]
    for name, network in networks.items():
        lines += [f"- {name}, {of['conclusion']}" for of in network["controls"].values()]
    return "\n".join(lines) + "\n"


TITLES = {"ln1": "attention", "ln2": "MLP and skip", "unembed": "unembedding", "sum": "sum of the stages"}
LABELS = {
    "learned": "learned, separately",
    "learned_joint": "learned, shared rotations",
    "published_lib": "LIB, published",
    "published_pca": "PCA, published",
}


def figure(edges: dict[str, dict[str, float]], networks: dict[str, dict[str, Any]]) -> Figure:
    """Edges needed by stage and basis, and every stage's small Jacobian entries beside random weights."""
    methods = sorted(edges["sum"], key=lambda m: edges["sum"][m])
    fig = Figure(figsize=(16, 4), dpi=120, layout="constrained")
    *axes, last = fig.subplots(1, len(edges) + 1)
    colours = ["#d55e00" if m.startswith("learned") else "#8a8a8a" for m in methods]
    for axis, (stage, counts) in zip(axes, edges.items(), strict=True):
        names = [LABELS.get(m) or basis_name(m) for m in methods]
        bars = axis.barh(names, [counts[m] for m in methods], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.set(title=TITLES[stage], xscale="log", xlabel="edges needed", xlim=(5, 2e5))
        axis.invert_yaxis()
        if axis is not axes[0]:
            axis.set_yticklabels([])
    for offset, (name, colour) in zip(
        (-0.1, 0.1), {"learned": "#d55e00", "random_weights": "#8a8a8a"}.items(), strict=True
    ):
        found = [[of["controls"][stage][name]["value"] for of in networks.values()] for stage in STAGES]
        at = np.repeat(np.arange(len(STAGES)) + offset, len(networks))
        last.plot(at, np.ravel(found), "o", color=colour, label=name.replace("_", " "))
    last.set(title="entries below 0.1 rms", ylim=(0, 1), xlim=(-0.5, len(STAGES) - 0.5))
    last.set_xticks(range(len(STAGES)), [TITLES[stage].replace(" ", "\n", 1) for stage in STAGES])
    last.legend(frameon=False, loc="lower left")
    return fig


def main(config: Config) -> None:
    folder = config.data / "modular_addition"
    paths = [config.checkpoint] if config.checkpoint else sorted(folder.glob("seed*.safetensors"))
    _common.require(paths or [folder / "seed0.safetensors"], SOURCE)
    if config.quick:
        config = dataclasses.replace(config, restarts=3, steps=1500, keys=1)
        paths = paths[:1]
    published_file = paths[0].with_name("published.json")
    published = json.loads(published_file.read_text())["seeds"] if published_file.exists() else {}
    with _common.run("modular_addition", config) as run:
        networks = {}
        for path in paths:
            networks[path.stem] = study(path, config, published.get(path.stem.removeprefix("seed"), {}))
            print(f"{path.stem}: {json.dumps(networks[path.stem]['edges_needed'])}", flush=True)
        means = mean_edges(networks)
        metrics = {"edges_needed": means, "networks": networks}
        run.finish(metrics, report(networks, means, config), edges_needed=figure(means, networks))


if __name__ == "__main__":
    _common.start(main, Config)
