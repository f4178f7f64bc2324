"""A transformer's parameters with its residual stream in other coordinates, `z = R x`.

Every matrix that reads the stream and every one that writes to it takes up the rotation, `W Rᵀ` and `R W`, embeddings
and head too; a norm without scale commutes with it. First the norms' scales γ move into the readers behind them,
`W diag(γ)`, and their biases into the readers' biases, `b + W β`. LayerNorm also removes the mean, which does not
commute: so the writers are centred, `P W` with `P = I - m mᵀ` and `m = 1/√d`, and nothing is left to remove (Ashkboos
et al., "SliceGPT", 2024). Different rotations at different places leave `R' Rᵀ` on the skip connection between them.

Pure arithmetic on float64 arrays: `fold` checks what goes in and what comes out.
"""

import numpy as np
from jaxtyping import Float

from rotsparse._core.types import AnyArray
from rotsparse.models.config import TransformerConfig
from rotsparse.models.embedding import norm_of
from rotsparse.models.model import Params


def stream_places(config: TransformerConfig) -> list[str]:
    """The places in the residual stream that can have a rotation each, in order."""
    if config.parallel:
        return [*(f"layer {i}" for i in range(config.n_layers)), "final"]
    return [f"layer {i} {part}" for i in range(config.n_layers) for part in ("attention", "mlp")] + ["final"]


def keep_mean(r: Float[AnyArray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The rotation nearest to `r` that leaves the mean direction `m = 1/√d` where it is, up to its sign: `R m = ±m`.

    Between the directions across m it is the polar factor of `P R P`. A LayerNorm model can take up such a rotation
    and stay within its own file format.
    """
    r = np.asarray(r, np.float64)
    m = np.full((len(r), 1), len(r) ** -0.5)
    across = r - m @ (m.T @ r)
    across = across - (across @ m) @ m.T
    sign = 1.0 if (m.T @ r @ m).item() >= 0 else -1.0
    u, _, vt = np.linalg.svd(across + sign * (m @ m.T))
    return u @ vt


def moved_mean(r: np.ndarray) -> float:
    """How far from `±m` the rotation takes m."""
    m = np.full(len(r), len(r) ** -0.5)
    return float(min(np.linalg.norm(r @ m - m), np.linalg.norm(r @ m + m)))


def rotate_stream(params: Params, config: TransformerConfig, matrices: list[np.ndarray]) -> Params:
    """The parameters with the stream rotated by one matrix at each of `stream_places(config)`. The norms lose their
    scales, and LayerNorms have nothing left to centre: they may be RMSNorms."""
    if config.norm == "layer":
        matrices_of_writers = [r - r.mean(axis=1, keepdims=True) for r in matrices]  # R P
    else:
        matrices_of_writers = matrices
    first, final = matrices_of_writers[0], matrices[-1]
    unembed, last_norm = _fold_head(
        params.get("unembed", params["embed"]), norm_of(params["final_norm"], config), params["final_norm"], final
    )
    folded = {**params, "embed": params["embed"] @ first.T, "unembed": unembed, "final_norm": last_norm}
    if "positions" in params:
        folded["positions"] = params["positions"] @ first.T
    folded["layers"] = []
    for i, layer in enumerate(params["layers"]):
        before, between, after = (i, i, i + 1) if config.parallel else (2 * i, 2 * i + 1, 2 * i + 2)
        new = dict(layer)
        # In a parallel block attention and MLP read one place and write to one; their sum has one skip connection.
        attn_after = after if config.parallel else between
        new["attn"], new["attn_norm"] = _fold_readers(
            layer["attn"], "qkv", layer["attn_norm"], config, matrices[before]
        )
        new["attn"] = _fold_writer(new["attn"], "o", matrices_of_writers[attn_after])
        reading, writing = (("gate", "up"), "down") if config.gated else (("in",), "out")
        new["mlp"], new["mlp_norm"] = _fold_readers(layer["mlp"], reading, layer["mlp_norm"], config, matrices[between])
        new["mlp"] = _fold_writer(new["mlp"], writing, matrices_of_writers[after])
        _fold_skip(new, "attn_skip", matrices[before], matrices[attn_after])
        if not config.parallel:
            _fold_skip(new, "mlp_skip", matrices[between], matrices[after])
        folded["layers"].append(new)
    return folded


def _fold_readers(p: Params, names, norm_params: Params, config, r) -> tuple[Params, Params]:
    """`W N(x) + b` as `(W diag(γ) P Rᵀ) n̂(R x) + (b + W β)`."""
    norm, p = norm_of(norm_params, config), dict(p)
    for name in names:
        w = p[f"w_{name}"]
        p[f"w_{name}"] = norm.absorb(w) @ r.T
        if norm.bias is not None and (norm.bias.any() or f"b_{name}" in p):
            p[f"b_{name}"] = p.get(f"b_{name}", 0) + w @ norm.bias
    return p, {name: np.ones_like(a) if name == "scale" else np.zeros_like(a) for name, a in norm_params.items()}


def _fold_writer(p: Params, name: str, r) -> Params:
    """`R P W` and `R P b`."""
    p = {**p, f"w_{name}": r @ p[f"w_{name}"]}
    return {**p, f"b_{name}": r @ p[f"b_{name}"]} if f"b_{name}" in p else p


def _fold_head(w, norm, norm_params: Params, r) -> tuple[np.ndarray, Params]:
    """The head behind the last norm. Heads have no bias that could take up `W β`."""
    if (norm.scale == 1).all():  # β may stay where it is: R (n̂ + β) = n̂(R x) + R β
        return w @ r.T, {name: r @ a if name == "bias" else a for name, a in norm_params.items()}
    ones = {"scale": np.ones_like(norm.scale)}
    if norm.bias is None:
        return norm.absorb(w) @ r.T, ones
    # n̂ never points along m, so the head's column there is free to hold W β, with a new bias of R m to pick it up:
    # (W diag(γ) P + (W β) mᵀ) Rᵀ (R n̂ + R m) = W (γ ⊙ n̂ + β).
    assert norm.mean_direction is not None, "only a LayerNorm comes with both a scale and a bias"
    m = norm.mean_direction
    return (norm.absorb(w) + np.outer(w @ norm.bias, m)) @ r.T, {**ones, "bias": r @ m}


def _fold_skip(layer: Params, name: str, before, after) -> None:
    """`R' S Rᵀ`; nothing where that is the identity."""
    if name in layer:
        layer[name] = after @ layer[name] @ before.T
    elif before is not after and not np.array_equal(before, after):
        layer[name] = after @ before.T
