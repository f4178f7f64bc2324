"""The text of single tokens, for people to read."""

from rotsparse.models.load import Tokenizer
from rotsparse.models.model import Model


def vocabulary(tokenizer: Tokenizer, model: Model) -> list[str]:
    """The text of every token that the model has, with the spaces that belong to it; `""` for tokens without text, such
    as those that begin or end one.

    Tokenizers leave out a space at the beginning of a text, so each token is decoded behind another one.
    """
    first = next((token for token in tokenizer.encode("a") if tokenizer.decode([token]).strip()), None)
    if first is None:
        return [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    known, before = tokenizer.vocab_size, tokenizer.decode([first])
    words = []
    for token in range(model.config.vocab_size):
        text = tokenizer.decode([first, token]) if token < known else ""
        words.append(text[len(before) :] if text.startswith(before) else text)
    return words
