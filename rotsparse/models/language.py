"""What a language model is judged by: the cross-entropy of a text, and the text it writes itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse.models.model import AnyArray, Model
from rotsparse.models.transformer import run


def cross_entropy(
    logits: Float[Array, "batch tokens vocab"], tokens: Int[AnyArray, "batch tokens"]
) -> Float[Array, "batch tokens-1"]:
    """Nats of every token but the first, given those before it: `-log p(t_i | t_<i)`."""
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


def generate(
    model: Model,
    prompts: Int[AnyArray, "batch prompt"],
    length: int,
    *,
    key: PRNGKeyArray | None = None,
    temperature: float = 1.0,
) -> np.ndarray:
    """Continue each prompt to `length` tokens: the likeliest token each time, or, with a key, samples at `temperature`.

    The whole sequence is computed again for every token: right for small models, slow for large ones.
    Raises `ValueError` where `length` exceeds the model's positions or the model has no head.
    """
    if not model.config.head or not model.config.causal:
        raise ValueError(f"a {model.config.architecture} model has no next-token head, so it cannot write text")
    prompts = jnp.asarray(prompts)
    if not 0 < prompts.shape[1] < length:
        raise ValueError(f"length counts the prompt: expected more than its {prompts.shape[1]} tokens, got {length}")
    return np.asarray(_generate(model.params, model.config, prompts, length, key, temperature))


@partial(jax.jit, static_argnames=("config", "length"))
def _generate(params, config, prompts, length, key, temperature):
    start = prompts.shape[1]
    padded = jnp.pad(prompts, ((0, 0), (0, length - start)))

    def step(i, tokens):
        logits = run(params, config, tokens)[0][:, i - 1]
        if key is None:
            chosen = jnp.argmax(logits, axis=-1)
        else:
            chosen = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        return tokens.at[:, i].set(chosen.astype(tokens.dtype))

    return jax.lax.fori_loop(start, length, step, padded)
