"""The rotary embedding that a `config.json` describes.

The transformers library takes `rope_scaling` (version 4) where there is one, and `rope_parameters` (version 5)
otherwise: never a mixture. What neither has is read from beside them.
"""

import math
from collections.abc import Mapping
from typing import Any

from rotsparse.models.families.settings import Settings, positive
from rotsparse.models.rotary import Dynamic, Linear, Llama3, LongRope, Proportional, Rotary, Scaling, Yarn

KEYS = "rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings"
_KNOWN = frozenset(
    "rope_theta rope_type type partial_rotary_factor factor original_max_position_embeddings attention_factor "
    "beta_fast beta_slow short_factor long_factor low_freq_factor high_freq_factor mscale mscale_all_dim "
    "truncate".split()
)


class Rope:
    """The entries about rotary embeddings: one of them, or those of one kind of layers."""

    def __init__(self, settings: Settings, name: str, entries: Any):
        if not isinstance(entries, Mapping):
            raise ValueError(f"config.json: {name} should be an object such as {{'rope_type': ...}}, got {entries!r}")
        unknown = sorted(str(key) for key in entries.keys() - _KNOWN if entries[key] is not None)
        if unknown:
            raise ValueError(f"config.json: {name} has {unknown[0]!r}, which is not known here")
        self._s, self._name, self._entries = settings, name, dict(entries)

    @property
    def kind(self) -> str:
        kind = self._entries.get("rope_type", self._entries.get("type", "default"))
        if not isinstance(kind, str):
            raise ValueError(f"config.json: {self._name} has no 'rope_type' that says how to scale, got {kind!r}")
        return kind

    def rotary(
        self,
        d_head: int,
        *,
        theta: float,
        share: float = 1.0,
        partial: bool = False,
        original: int | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> Rotary:
        """`theta`, `share`: what holds where these entries do not say. `partial`: whether the family can turn a part
        of each head. `original`: the original context length where it stands beside these entries. `kinds`: the
        family's own words for the types, and only these."""
        if kinds is not None and self.kind not in kinds:
            raise ValueError(f"config.json: rotary type {self.kind!r} is not supported: expected {', '.join(kinds)}")
        kind = self.kind if kinds is None else kinds[self.kind]
        theta = self._number("rope_theta", theta)
        share = self._number("partial_rotary_factor", share)
        if kind == "proportional":
            turning = int(share * d_head // 2)
            return Rotary(d_head, theta, scaling=Proportional(turning, self._number("factor", 1.0)))
        if share != 1 and not partial:
            raise ValueError(
                f"config.json: partial_rotary_factor = {share:g} is not supported for a {self._s.kind} model, whose "
                "heads turn as a whole"
            )
        return Rotary(int(d_head * share), theta, scaling=self._scaling(kind, int(d_head * share), original))

    def _scaling(self, kind: str, dims: int, original: int | None) -> Scaling | None:
        if kind == "default":
            return None
        if kind == "linear":
            return Linear(self._number("factor"))
        if kind == "dynamic":
            if dims <= 2:
                raise ValueError(f"config.json: dynamic scaling needs more than {dims} rotary dimensions")
            return Dynamic(self._number("factor"), self._s.integer("max_position_embeddings"))
        context = self._context(original)
        if kind == "llama3":
            low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
            if not low < high:
                raise ValueError(f"config.json: {self._name}: low_freq_factor {low:g} is not below {high:g}, the high")
            return Llama3(self._number("factor"), low, high, context)
        if kind == "yarn":
            return self._yarn(context)
        if kind == "longrope":
            short, long = (self._list(f"{length}_factor", dims // 2) for length in ("short", "long"))
            return LongRope(short, long, context, self._longrope_amplitude(context))
        raise ValueError(
            f"config.json: rotary type {kind!r} is not supported: expected default, linear, dynamic, yarn, longrope, "
            "llama3 or proportional"
        )

    def _yarn(self, context: int) -> Yarn:
        if "factor" not in self._entries:
            raise ValueError(f"config.json: {self._name} has no 'factor'")
        factor = self._number("factor", self._s.integer("max_position_embeddings") / context)

        def amplitude(scale: float = 1.0) -> float:
            return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

        scale, all_dims = self._entries.get("mscale"), self._entries.get("mscale_all_dim")
        if scale and all_dims:
            usual = amplitude(self._number("mscale")) / amplitude(self._number("mscale_all_dim"))
        else:
            usual = amplitude()
        truncate = self._entries.get("truncate", True)
        if not isinstance(truncate, bool):
            raise ValueError(f"config.json: {self._name}: truncate should be true or false, got {truncate!r}")
        fast, slow = (self._number(f"beta_{end}", usual) for end, usual in (("fast", 32.0), ("slow", 1.0)))
        return Yarn(factor, fast, slow, context, self._number("attention_factor", usual), truncate)

    def _longrope_amplitude(self, context: int) -> float:
        factor = self._number("factor", self._s.integer("max_position_embeddings") / context)
        if context < 2:
            raise ValueError(f"config.json: {self._name}: an original context of {context} token is too short")
        usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
        return self._number("attention_factor", usual)

    def _context(self, original: int | None) -> int:
        """The original context length: an entry beside these ones comes first."""
        context = original or self._entries.get("original_max_position_embeddings")
        context = self._s.integer("max_position_embeddings") if context is None else context
        if isinstance(context, float) and context.is_integer() and abs(context) < 1 << 40:
            context = int(context)
        if type(context) is not int or not 1 <= context < 1 << 40:
            raise ValueError(f"config.json: original_max_position_embeddings should be a whole number, got {context!r}")
        return context

    def _number(self, key: str, usual: float | None = None) -> float:
        value = self._entries.get(key)
        value = usual if value is None else value
        if value is None:
            raise ValueError(f"config.json: {self._name} has no {key!r}, which its type {self.kind!r} needs")
        return positive(f"{key} of {self._name}", value)

    def _list(self, key: str, length: int) -> tuple[float, ...]:
        values = self._entries.get(key)
        if not isinstance(values, list) or len(values) != length:
            raise ValueError(f"config.json: {self._name}: {key} should be a list of {length} numbers")
        return tuple(positive(f"{key} of {self._name}", value) for value in values)


def reach(rotary: Rotary, max_positions: int) -> int:
    """How many positions a model with this embedding has: dynamic scaling is there to go beyond the trained ones."""
    scaling = rotary.scaling
    return int(scaling.factor * max_positions) if isinstance(scaling, Dynamic) else max_positions


def chosen(settings: Settings) -> Rope:
    """The entries that count: those of `rope_scaling` if there are any, otherwise of `rope_parameters`."""
    for name in ("rope_scaling", "rope_parameters"):
        if entries := settings.raw.get(name):
            return Rope(settings, name, entries)
    return Rope(settings, "rope_parameters", {})


def one_rotary(settings: Settings, d_head: int, **options: Any) -> Rotary:
    """The rotary embedding of a model that has one for all layers."""
    theta = settings.optional_number("rope_theta") or 10000.0
    share = settings.optional_number("partial_rotary_factor") or 1.0
    original = settings.optional_integer("original_max_position_embeddings")
    return chosen(settings).rotary(d_head, **{"theta": theta, "share": share, "original": original, **options})
