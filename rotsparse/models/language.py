"""Evaluation of language models: the cross-entropy of a text, and generated text."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from rotsparse._core.types import AnyArray
from rotsparse.models.model import Model
from rotsparse.models.transformer import Intervention, check_point, step


def cross_entropy(
    logits: Float[Array, "batch tokens vocab"], tokens: Integer[AnyArray, "batch tokens"]
) -> Float[Array, "batch tokens-1"]:
    """Nats of every token but the first, given those before it: `-log p(t_i | t_<i)`."""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


def generate(
    model: Model,
    prompts: Integer[AnyArray, "batch prompt"],
    length: int,
    *,
    key: PRNGKeyArray | None = None,
    temperature: float = 1.0,
    intervene: Mapping[tuple[int, str], Intervention] | None = None,
) -> np.ndarray:
    """Continue each prompt to `length` tokens: the likeliest token each time, or, with a key, samples at `temperature`.
    `intervene` maps points to functions that replace the values there (see `interventions`), at every position; they
    see one position at a time, `[batch, 1, d]`.

    Raises `ValueError` if `length` exceeds the model's positions or the model has no head.
    """
    if not model.config.head or not model.config.causal:
        raise ValueError(f"a {model.config.architecture} model has no next-token head, so it cannot write text")
    prompts = jnp.asarray(prompts)
    if not 0 < prompts.shape[1] < length <= model.config.max_positions:
        raise ValueError(
            f"length counts the prompt: expected more than its {prompts.shape[1]} tokens and at most the model's "
            f"{model.config.max_positions} positions, got {length}"
        )
    points = {check_point(model.config, point): change for point, change in (intervene or {}).items()}
    return np.asarray(_generate(model.params, model.config, prompts, length, key, jnp.asarray(temperature), points))


@eqx.filter_jit
def _generate(params, config, prompts, length, key, temperature, intervene):
    batch, start = prompts.shape
    cache = jnp.zeros((config.n_layers, 2, batch, length, config.n_kv_heads, config.d_head), params["embed"].dtype)
    tokens = jnp.pad(prompts, ((0, 0), (0, length - start)))

    def write(i, carry):
        tokens, cache = carry
        logits, cache = step(params, config, tokens[:, i], i, cache, intervene=intervene)
        if key is None:
            chosen = jnp.argmax(logits, axis=-1)
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        chosen = jnp.where(i + 1 < start, tokens[:, i + 1], chosen.astype(tokens.dtype))
        return tokens.at[:, i + 1].set(chosen), cache

    return jax.lax.fori_loop(0, length - 1, write, (tokens, cache))[0]
