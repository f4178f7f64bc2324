"""The tokenizer inside a GGUF file, as one of the tokenizers library.

GGUF stores the vocabulary, and for byte-pair encodings the merges; how a text is first cut into words is only named
(`tokenizer.ggml.pre`). The regular expressions are those of the models' own tokenizer files.
"""

import json
import os
from pathlib import Path
from typing import Any

from rotsparse.models.gguf_file import GgufFile

_SPACE = "▁"
_CONTROL, _USER_DEFINED = 3, 4
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {
    "default": None,
    "gpt-2": None,
    "gpt-neox": None,
    "olmo": None,
    "mpt": None,
    "smollm": "digits",
    "starcoder": "digits",
    "llama-bpe": _GPT4,
    "dbrx": _GPT4,
    "qwen2": _GPT4.replace("{1,3}", ""),
}


def gguf_tokenizer(path: str | os.PathLike):
    """A `tokenizers.Tokenizer`. Raises `ValueError` if the file has none, or one of an unknown kind."""
    file = GgufFile(Path(path))
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "a GGUF file's tokenizer needs the tokenizers library: pip install 'rotsparse[gguf]'"
        ) from None
    kind, tokens = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.tokens")
    makers = {"gpt2": _byte_pairs, "llama": _sentence_pieces, "bert": _word_pieces}
    if kind not in makers or not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(
            f"{path} has a tokenizer of kind {kind!r}: expected {', '.join(makers)} with its tokens. Use the "
            "tokenizer.json of the original model with --tokenizer"
        )
    tokenizer = makers[kind](file, tokens, tokenizers)
    _add_special(file, tokens, tokenizer, tokenizers)
    return tokenizer


def save_tokenizer(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write the tokenizer of a GGUF file into a Hugging Face folder, with its special tokens and its chat template, so
    that transformers loads it. Raises `ValueError` as `gguf_tokenizer` does."""
    gguf_tokenizer(path).save(str(Path(folder) / "tokenizer.json"))
    metadata = GgufFile(Path(path)).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            config[f"{role}_token"] = tokens[number]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _byte_pairs(file: GgufFile, tokens: list[str], tk: Any):
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _WORDS:
        raise ValueError(
            f"{file.path}: texts are cut into words as {pre!r} does, which is not known here (known: "
            f"{', '.join(_WORDS)}). Use the tokenizer.json of the original model with --tokenizer"
        )
    merges = file.metadata.get("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges or [] if isinstance(merge, str) and " " in merge[1:]]
    vocabulary = {token: i for i, token in reversed(list(enumerate(tokens)))}
    if merges is None or any(a not in vocabulary or b not in vocabulary or a + b not in vocabulary for a, b in pairs):
        raise ValueError(f"{file.path} is damaged: its merges are not of its tokens")
    tokenizer = tk.Tokenizer(tk.models.BPE(vocabulary, pairs))
    by_bytes = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=_WORDS[pre] in (None, "digits"))
    if _WORDS[pre] == "digits":
        first = [tk.pre_tokenizers.Digits(individual_digits=True)]
    else:
        first = [tk.pre_tokenizers.Split(tk.Regex(_WORDS[pre]), "isolated")] if _WORDS[pre] else []
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence([*first, by_bytes])
    tokenizer.decoder = tk.decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = tk.normalizers.NFC()
    return tokenizer


def _sentence_pieces(file: GgufFile, tokens: list[str], tk: Any):
    """SentencePiece: neighbours whose union is a token are merged, the best-scored union first."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError(f"{file.path} is damaged: its tokenizer has no score for each token")
    numbers = {token: i for i, token in reversed(list(enumerate(tokens)))}
    merges = [
        (scores[i], -at, token[:at], token[at:])
        for token, i in numbers.items()
        if len(token) <= 256  # a damaged file's tokens may be as long as the file
        for at in range(1, len(token))
        if token[:at] in numbers and token[at:] in numbers
    ]
    pairs = [(a, b) for _, _, a, b in sorted(merges, key=lambda merge: merge[:2], reverse=True)]
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    unk = tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None
    tokenizer = tk.Tokenizer(tk.models.BPE(numbers, pairs, unk_token=unk, fuse_unk=True, byte_fallback=True))
    in_front = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [tk.normalizers.Prepend(_SPACE)] if in_front else []
    tokenizer.normalizer = tk.normalizers.Sequence([*steps, tk.normalizers.Replace(" ", _SPACE)])
    back = [tk.decoders.Replace(_SPACE, " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    tokenizer.decoder = tk.decoders.Sequence([*back, *([tk.decoders.Strip(" ", 1, 0)] if in_front else [])])
    return tokenizer


def _word_pieces(file: GgufFile, tokens: list[str], tk: Any):
    """BERT's pieces, of which GGUF marks those that begin a word, and BERT those that do not."""
    kinds = _kinds(file, tokens)

    def bert(i: int, token: str) -> str:
        if kinds[i] == _CONTROL or token.startswith("["):
            return token
        return token.removeprefix(_SPACE) if token.startswith(_SPACE) else f"##{token}"

    words = {bert(i, token): i for i, token in reversed(list(enumerate(tokens)))}
    tokenizer = tk.Tokenizer(tk.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = tk.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tk.decoders.WordPiece()
    return tokenizer


def _kinds(file: GgufFile, tokens: list[str]) -> list[int]:
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    return kinds if isinstance(kinds, list) and len(kinds) == len(tokens) else [1] * len(tokens)


def _add_special(file: GgufFile, tokens: list[str], tokenizer: Any, tk: Any) -> None:
    """Tokens that are never cut, and those that the model expects around every text."""
    kinds = _kinds(file, tokens)
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([tk.AddedToken(t, special=True, normalized=False) for t, k in added if k == _CONTROL])
    tokenizer.add_tokens([tk.AddedToken(t, normalized=False) for t, k in added if k == _USER_DEFINED])

    kind = file.metadata["tokenizer.ggml.model"]
    usual = {"bos": kind != "gpt2" or file.metadata.get("tokenizer.ggml.pre") == "llama-bpe", "eos": kind == "bert"}
    names = {"bos": ("bos", "cls"), "eos": ("eos", "seperator", "separator")} if kind == "bert" else {}
    around = {}
    for side in ("bos", "eos"):
        numbers = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names.get(side, (side,))]
        found = [n for n in numbers if type(n) is int and 0 <= n < len(tokens)]
        if file.metadata.get(f"tokenizer.ggml.add_{side}_token", usual[side]) and found:
            around[side] = found[-1] if kind == "bert" else found[0]
    if around:
        single = [tokens[around[s]] if s in around else None for s in ("bos", "eos")]
        template = " ".join(part for part in (single[0], "$A", single[1]) if part)
        special = [(tokens[number], number) for number in sorted(set(around.values()))]
        tokenizer.post_processor = tk.processors.TemplateProcessing(single=template, special_tokens=special)
