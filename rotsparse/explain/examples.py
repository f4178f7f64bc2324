"""Examples to show: tokens in their context where the inputs come from a text, single examples otherwise."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rotsparse._core.printable import visible
from rotsparse.data.store import NO_TOKEN, ActivationStore

# Tokens that are shown before and behind the one that is meant; as many before it make two contexts the same.
BEFORE, BEHIND, ALIKE = 12, 5, 2

# Rows of a store that are looked at, as whole sequences.
MOST_ROWS = 20_000


class Context(NamedTuple):
    """An example, and how far a direction's coordinate lies from its mean there.

    `value`: in standard deviations of the coordinate. `words`: the tokens around it, or the label of an example that is
    none of a text; `values` of the coordinate at each of them, `None` where it was not captured; `at`: which of them it
    is. `sequence`, `position`: where it is (of an example that is none of a text, its number and 0).
    """

    sequence: int
    position: int
    value: float
    words: tuple[str, ...]
    values: tuple[float | None, ...]
    at: int


class Examples:
    """Inputs `x` `[n, d]` of a layer. `labels`: a name for each; `pictures`: `[n, height, width]`, 0 to 1."""

    def __init__(
        self,
        x: Float[np.ndarray, "n d"],
        *,
        labels: Sequence[str] | None = None,
        pictures: Float[np.ndarray, "n h w"] | None = None,
    ):
        for name, of in {"labels": labels, "pictures": pictures}.items():
            if of is not None and len(of) != len(x):
                raise ValueError(f"{name} should be one for each of the {len(x)} examples, got {len(of)}")
        self.x, self.labels, self.pictures = x, labels, pictures

    def alike(self, row: int) -> Hashable:
        """What two examples share if one of them is enough."""
        return row

    def context(self, row: int, z: Float[np.ndarray, "n"]) -> Context:
        """An example; `z`: the coordinate of every example, in standard deviations from the mean."""
        label = visible(self.labels[row]) if self.labels is not None else f"example {row}"
        value = float(z[row])
        return Context(row, 0, value, (label,), (value,), 0)


class Texts(Examples):
    """Inputs at tokens of a text. `places`: sequence and position of every row; `tokens`: those of every sequence;
    `words`: the text of every token, `None` to show their numbers."""

    def __init__(
        self,
        x: Float[np.ndarray, "n d"],
        places: Int[np.ndarray, "n 2"],
        tokens: Int[np.ndarray, "sequences positions"],
        words: Sequence[str] | None,
    ):
        super().__init__(x)
        self.places, self.tokens = places, tokens
        self.words = words
        self._row = np.full(tokens.shape, -1)
        self._row[tuple(places.T)] = np.arange(len(places))

    def alike(self, row):
        sequence, position = self.places[row]
        return tuple(self.tokens[sequence, max(0, position - ALIKE) : position + 1].tolist())

    def context(self, row, z):
        sequence, position = map(int, self.places[row])
        start = max(0, position - BEFORE)
        shown = self.tokens[sequence, start : position + BEHIND + 1]
        shown = shown[: int(np.argmax(shown == NO_TOKEN)) if (shown == NO_TOKEN).any() else len(shown)]
        rows = self._row[sequence, start : start + len(shown)]
        values = tuple(float(z[r]) if r >= 0 else None for r in rows)
        words = tuple(self.word(int(token)) for token in shown)
        return Context(sequence, position, float(z[row]), words, values, position - start)

    def word(self, token: int) -> str:
        """The text of a token, with what is invisible written out."""
        return word(self.words, token)


def word(words: Sequence[str] | None, token: int) -> str:
    """The text of a token for people to see: line breaks as ⏎, what is invisible written out, and its number where
    there is no text, or half a character (bytes that only make one together with others)."""
    text = words[token] if words is not None and token < len(words) else ""
    text = "" if set(text) == {"\ufffd"} else text
    return visible(text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")) or f"⟨{token}⟩"


def texts(store: ActivationStore, words: Sequence[str] | None = None, *, most: int = MOST_ROWS) -> Examples:
    """Rows of a store as examples: whole sequences, evenly spaced, of at most about `most` rows. `words` instead of the
    store's own vocabulary. Rows of images are examples by their number. Raises `ValueError` for a store that does not
    say where its rows come from."""
    places = store.places()
    numbers = np.unique(places[:, 0])
    count = max(1, int(len(numbers) * min(1, most / len(places))))
    chosen = numbers[np.linspace(0, len(numbers) - 1, count).round().astype(int)]
    rows = np.flatnonzero(np.isin(places[:, 0], chosen))
    x = np.asarray(store.read(rows))
    if not all("tokens" in shard["beside"] for shard in store.manifest["shards"]):
        return Examples(x, labels=[f"image {image}, patch {patch}" for image, patch in places[rows]])
    return Texts(x, places[rows], store.tokens(), words if words is not None else store.vocabulary())
