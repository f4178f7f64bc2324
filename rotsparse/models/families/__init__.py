"""The families of models that can be read and written, one row for each `model_type` of Hugging Face's `config.json`.

A row says which tensors there are, and what each entry of the configuration means; the same table serves reading and
writing. A new family is a row in one of these files, and its check against transformers in the tests.
"""

from collections.abc import Mapping
from typing import Any

from rotsparse.models.config import TransformerConfig
from rotsparse.models.families import bert, gpt, llama, vit
from rotsparse.models.families.family import Entry as Entry
from rotsparse.models.families.family import Family as Family
from rotsparse.models.families.settings import Settings

FAMILIES: dict[str, Family] = {**llama.FAMILIES, **gpt.FAMILIES, **bert.FAMILIES, **vit.FAMILIES}


def read_config(raw: Mapping[str, Any], *, head: bool) -> TransformerConfig:
    """The computation that a `config.json` describes, with or without a language model's head.

    Raises `ValueError` for entries that are missing, unknown or unsupported.
    """
    family = family_of(raw)
    return TransformerConfig(**{"head": head, **family.settings(Settings(raw, family))})


def family_of(raw: Mapping[str, Any]) -> Family:
    """The row of a configuration's `model_type`. Raises `ValueError` that lists the known ones."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"unknown architecture {kind!r}: expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]
