"""Trained models: read them, capture their activations, and fold rotations into them.

    model = models.load_model("path/to/model")                   # a Hugging Face folder, GGUF, or llama2.c's .bin
    tokenizer = models.load_tokenizer("path/to/model", model)
    text = models.TextFile("text.txt", tokenizer)
    (store,) = models.capture(model, text, [(0, "input")], "activations")
    layer = models.mlp_layer(model, 0)                           # what maps the site "input" to "output"
    solution = rs.find_rotations(layer, store.read(range(10_000)), key=jax.random.key(0))
    folded = models.fold_mlp(model, 0, solution.rotations, tokens)

`fold_stream` rotates a whole residual stream, and `save_model` writes such a model in the format that it came in.
Models of other JAX libraries: `read_layer` and `write_layer`.
"""

from rotsparse.data.store import ActivationStore as ActivationStore
from rotsparse.data.store import open_store as open_store
from rotsparse.models._capture import capture as capture
from rotsparse.models.adapters import EQUINOX as EQUINOX
from rotsparse.models.adapters import FLAX as FLAX
from rotsparse.models.adapters import Where as Where
from rotsparse.models.adapters import array_names as array_names
from rotsparse.models.adapters import equinox_mlp as equinox_mlp
from rotsparse.models.adapters import read_layer as read_layer
from rotsparse.models.adapters import write_layer as write_layer
from rotsparse.models.config import TransformerConfig as TransformerConfig
from rotsparse.models.fold import FoldedModel as FoldedModel
from rotsparse.models.fold import fold_mlp as fold_mlp
from rotsparse.models.fold import fold_stream as fold_stream
from rotsparse.models.fold import obstacle as obstacle
from rotsparse.models.fold import outputs as outputs
from rotsparse.models.heavy_rows import HeavyRows as HeavyRows
from rotsparse.models.interventions import Ablate as Ablate
from rotsparse.models.interventions import Clamp as Clamp
from rotsparse.models.interventions import Resample as Resample
from rotsparse.models.interventions import Steer as Steer
from rotsparse.models.interventions import Swap as Swap
from rotsparse.models.language import cross_entropy as cross_entropy
from rotsparse.models.language import generate as generate
from rotsparse.models.layers import mlp_layer as mlp_layer
from rotsparse.models.layers import with_mlp_layer as with_mlp_layer
from rotsparse.models.load import load_model as load_model
from rotsparse.models.load import load_tokenizer as load_tokenizer
from rotsparse.models.load import save_model as save_model
from rotsparse.models.model import Model as Model
from rotsparse.models.sequences import ImageFile as ImageFile
from rotsparse.models.sequences import TextFile as TextFile
from rotsparse.models.sequences import TokenFile as TokenFile
from rotsparse.models.stream import keep_mean as keep_mean
from rotsparse.models.stream import stream_places as stream_places
from rotsparse.models.summary import summarize as summarize
from rotsparse.models.transformer import SITES as SITES
from rotsparse.models.transformer import run as run
