"""`SparseInput` as a module of PyTorch."""

# Where PyTorch is not installed, the type checker takes this very package for it.
# pyright: reportAttributeAccessIssue=false

import numpy as np
import torch

from rotsparse.sparse.inputs import SparseInput


class DropCoordinates(torch.nn.Module):
    """`x̂ = R⁻¹ (k(R x - c) + c)`, as `SparseInput`.

    One module serves all linear layers that read a site: what was computed for the first is kept for the others, which
    get the same tensor, and given up with the last. Its arrays are no part of the model's state: they are in the file.
    """

    rotation: torch.Tensor | None
    back: torch.Tensor | None
    shift: torch.Tensor | None
    scores: torch.Tensor | None
    threshold: torch.Tensor | None

    def __init__(self, sparse: SparseInput, *, readers: int = 1):
        super().__init__()
        for name in ("rotation", "back", "shift", "scores", "threshold"):
            value = getattr(sparse, name)
            tensor = None if value is None else torch.tensor(np.asarray(value))
            self.register_buffer(name, tensor, persistent=False)
        self.count, self.readers = None if sparse.count is None else int(sparse.count), readers
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self._asked = 0

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """`k(R x - c)`."""
        z = x if self.rotation is None else x @ self.rotation.T
        z = z if self.shift is None else z - self.shift
        weight = z.abs() if self.scores is None else z.abs() * self.scores
        if self.threshold is not None:
            return torch.where(weight > self.threshold, z, 0)
        assert self.count is not None
        if self.count >= z.shape[-1]:
            return z
        beyond = weight.topk(self.count + 1, dim=-1).values[..., -1:]  # of equal ones that do not all fit none stays
        return torch.where(weight > beyond, z, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input with coordinates dropped."""
        if self._kept is None or self._kept[0] is not x:
            z = self.coordinates(x)
            z = z if self.shift is None else z + self.shift
            self._kept, self._asked = (x, z if self.back is None else z @ self.back.T), 0
        self._asked += 1
        result = self._kept[1]
        if self._asked >= self.readers:
            self._kept = None
        return result
