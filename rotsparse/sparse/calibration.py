"""What a model does on some text: its activations, a layer at a time, and how much its loss minds a change of them."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from rotsparse._core.precision import full_precision
from rotsparse.models.config import TransformerConfig
from rotsparse.models.inputs import TokenInputs
from rotsparse.models.model import Model
from rotsparse.models.sequences import TextFile, TokenFile
from rotsparse.models.transformer import Point, run_from, site_width
from rotsparse.sparse.walk import before, gradients, head, on_device, through

Tokens = Int[np.ndarray, "sequences length"]


def sequences(model: Model, source: TextFile | TokenFile, length: int) -> Tokens:
    """The whole sequences of `length` tokens of a text, with what the tokenizer puts around each. Raises `ValueError`
    for a model that predicts no next token, and a text that is shorter than two sequences."""
    if not model.config.head or not model.config.causal:
        raise ValueError(
            f"a {model.config.architecture} model predicts no next token, so its perplexity cannot be measured: "
            "capture its activations and use find_basis (rs.TopK(0.5)) and rotsparse.sparse.inputs.SparseInput instead"
        )
    length = min(length, model.config.max_positions)
    inputs = TokenInputs(model, source, length, None, 1, True)
    found = [inputs.batch([piece]) for piece, _ in inputs.pieces() if len(piece) == inputs.body]
    whole = [batch.inputs[0] for batch in found if batch.mask is None or batch.mask.all()]
    if len(whole) < 2:
        raise ValueError(f"{source.path} has {len(whole)} whole sequences of {length} tokens: two are the least")
    return np.stack(whole).astype(np.int32)


def spread(tokens: Tokens, count: int | None) -> Tokens:
    """Evenly spaced sequences, about `count` tokens, at least two sequences; `None`: all."""
    wanted = len(tokens) if count is None else min(len(tokens), max(2, count // tokens.shape[1]))
    return tokens[np.linspace(0, len(tokens) - 1, wanted).round().astype(int)]


def fisher_information(
    model: Model,
    tokens: Tokens,
    points: Sequence[tuple[int, str]],
    *,
    key: PRNGKeyArray,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[Point, Float[np.ndarray, "d d"]]:
    """`E[g gᵀ]` at each point, g the gradient of the model's cross-entropy with respect to the values there, `[d]`, for
    next tokens that the model itself draws: an error ε of the values at a token raises the Kullback-Leibler divergence
    of all predictions behind it by `½ εᵀ E[g gᵀ] ε` to second order (errors at different tokens taken as
    independent). `progress` is told the share that is done."""
    config, at = model.config, [Point(*point) for point in points]
    totals = {point: np.zeros((site_width(config, point.site),) * 2, np.float32) for point in at}
    zeros = {len(total): np.zeros((tokens.shape[1], len(total)), np.float32) for total in totals.values()}
    nothing = {point: zeros[len(total)] for point, total in totals.items()}
    for i, sequence in enumerate(tokens):
        streams = [before(model, sequence[None])]
        for layer in range(config.n_layers):
            streams.append(through(model, layer, streams[-1])[0])
        last = _gradient(head(model), streams.pop(), jax.random.fold_in(key, i), config)
        for point, of in gradients(model, streams, last, change=_added, fixed={}, moved=nothing):
            totals[point] += np.asarray(of).T @ np.asarray(of)
        progress((i + 1) / len(tokens))
    return {point: total / tokens.size for point, total in totals.items()}


def _added(_, shifts):
    return {site: partial(jnp.add, shift) for site, shift in shifts.items()}


@partial(jax.jit, static_argnames="config")
def _gradient(params, stream, key, config: TransformerConfig):
    """Of the cross-entropy of tokens that the model draws, with respect to the stream behind the last layer."""

    def loss(stream):
        logits = run_from(params, config, stream, config.n_layers)[0]
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1))

    with full_precision():
        return jax.grad(loss)(stream)


def activations(
    model: Model, tokens: Tokens, sites: Sequence[str], scratch: Path, *, layers: Sequence[int], batch: int = 8
) -> Iterator[tuple[int, Mapping[str, Float[np.ndarray, "n d"]]]]:
    """The values at the sites of each of the `layers` in turn, `[all tokens, d]`, on disk in `scratch` and overwritten
    when the next layer is asked for. The model is walked through once, with only its residual stream kept."""
    config, layers = model.config, sorted(layers)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        shape = (*tokens.shape, config.d_model)
        stream = np.lib.format.open_memmap(Path(folder) / "stream.npy", "w+", np.float32, shape)
        values = {
            site: np.lib.format.open_memmap(
                Path(folder) / f"{site}.npy", "w+", np.float32, (*tokens.shape, site_width(config, site))
            )
            for site in sites
        }
        for start in range(0, len(tokens), batch):
            rows = slice(start, start + batch)
            stream[rows] = before(model, tokens[rows])
        for layer in range(layers[-1] + 1):
            wanted, here = tuple(sites) if layer in layers else (), on_device(model, layer)
            for start in range(0, len(tokens), batch):
                rows = slice(start, start + batch)
                stream[rows], seen = through(here, layer, stream[rows], sites=wanted)
                for site in wanted:
                    values[site][rows] = seen[site]
            if wanted:
                yield layer, {site: of.reshape(-1, of.shape[-1]) for site, of in values.items()}
