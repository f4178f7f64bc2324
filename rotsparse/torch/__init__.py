"""Models with sparse inputs in PyTorch: what `export_sparse` wrote, in the transformers library.

    from rotsparse.torch import load_sparse
    model = load_sparse("folder")         # drops coordinates of the inputs of its linear layers; model.generate works

Needs the extra `torch`; nothing else of rotsparse imports PyTorch.
"""

from rotsparse.torch.load import load_sparse as load_sparse
from rotsparse.torch.load import sparsify_ as sparsify_
