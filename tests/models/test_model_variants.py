"""Every family under every variant of its configuration: what transformers computes to 1e-5, or refused by name."""

import json
import re
import warnings

import numpy as np
import pytest
from variants import ENCODERS, FAMILIES, VARIANTS

from rotsparse.models.load import load_model
from rotsparse.models.transformer import run

pytestmark = [pytest.mark.peers, pytest.mark.slow]
peers = pytest.importorskip("transformers_peers")

TOKENS = np.random.default_rng(0).integers(2, 61, (2, 24))
IMAGES = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_or_is_refused_by_name(family, tmp_path):
    wrong, counts = [], {"agrees": 0, "refused": 0, "no model": 0}
    for i, (name, change) in enumerate(VARIANTS.items()):
        small, activation = FAMILIES[family]
        change = {activation if key == "ACTIVATION" else key: value for key, value in change.items()}
        raw = {"model_type": family, **small, **change}
        outcome = compared(family, raw, change, tmp_path / str(i))
        counts[outcome if outcome in counts else "refused"] += 1
        if outcome not in counts:
            wrong.append(f"{name}: {outcome}")
    print(family, counts)
    assert not wrong, "\n".join(wrong)
    assert counts["agrees"] >= 20


def compared(family: str, raw: dict, change: dict, folder) -> str:
    """What became of a model with this configuration."""
    theirs = expected(family, raw, folder)
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        model = load_model(folder)
        ours = np.asarray(run(model.params, model.config, inputs(family))[0])
    except ValueError as error:
        fitting = theirs is None or named(str(error), change)
        return "refused" if fitting else f"refused with a message about something else: {error}"
    if theirs is None:
        return "no model"
    off = np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())
    return "agrees" if off < 1e-5 else f"differs by {off:.1e} of the largest output"


def inputs(family: str):
    return IMAGES if family == "vit" else TOKENS


def named(text: str, change: dict) -> bool:
    """Whether a message is about the change: one of its entries, or an entry or word inside of them."""
    words = {*change, *re.findall(r"\w+", json.dumps(change))}
    return any(re.search(rf"\b{re.escape(word)}\b", text) for word in words if not word.isdigit())


def expected(family: str, raw: dict, folder):
    """What transformers computes with a random model that it reads from a folder with this config.json; `None` where
    it has no such model."""
    transformers, torch = peers.transformers, peers.torch
    make = transformers.AutoModel if family in ENCODERS else transformers.AutoModelForCausalLM
    folder.mkdir()
    for weights_of in (raw, {"model_type": family, **FAMILIES[family][0]}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = transformers.AutoConfig.for_model(**json.loads(json.dumps(weights_of)))
                torch.manual_seed(0)
                model = make.from_config(config, attn_implementation="eager").eval()
                with torch.no_grad():
                    for parameter in model.parameters():
                        noise = torch.randn_like(parameter)
                        parameter.copy_(noise * 0.3 + 0.3 if noise.ndim == 1 else noise * noise.shape[-1] ** -0.5)
                model.save_pretrained(folder)
                (folder / "config.json").write_text(json.dumps(raw))
                again = make.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()
                return peers.peer_output(again, inputs(family))
        except Exception:  # whatever goes wrong there, there is nothing to compare with
            continue
    return None
