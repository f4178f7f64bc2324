"""A layer restricted to some of its input and output directions."""

from jaxtyping import Float

from rotsparse._core.types import AnyArray
from rotsparse.layers.base import Layer, Matrix


class Subspace(Layer):
    """A layer with the Jacobian `P_out J P_inᵀ`, for frames P with orthonormal rows. Examples keep all their
    coordinates, so gates and norms are those of the original layer."""

    layer: Layer
    frame_in: Float[AnyArray, "k_in d_in"]
    frame_out: Float[AnyArray, "k_out d_out"]

    def __init__(self, layer: Layer, frame_in: Matrix, frame_out: Matrix):
        self.layer, self.frame_in, self.frame_out = layer, frame_in, frame_out

    @property
    def d_in(self) -> int:
        return self.frame_in.shape[0]

    @property
    def d_out(self) -> int:
        return self.frame_out.shape[0]

    def __call__(self, x):
        return self.layer(x) @ self.frame_out.T

    def prepared(self, x):
        return self.layer.prepared(x)

    def prepared_jacobian(self, x, prepared, r_in=None, r_out=None):
        frame_in = self.frame_in if r_in is None else r_in @ self.frame_in
        frame_out = self.frame_out if r_out is None else r_out @ self.frame_out
        return self.layer.prepared_jacobian(x, prepared, frame_in, frame_out)

    def jacobian(self, x, r_in=None, r_out=None):
        return self.prepared_jacobian(x, self.prepared(x), r_in, r_out)

    def gathered(self, x):
        return Subspace(self.layer.gathered(x), self.frame_in, self.frame_out)

    def rotate(self, r_in, r_out):
        frame_in = self.frame_in if r_in is None else r_in @ self.frame_in
        frame_out = self.frame_out if r_out is None else r_out @ self.frame_out
        return Subspace(self.layer, frame_in, frame_out)
