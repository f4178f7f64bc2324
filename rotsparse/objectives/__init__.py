"""Objectives: what is minimised over the rotations.

An *activation space* (the input of a layer, its output, the residual stream) has a name and one rotation. An objective
is a function of the rotations of some spaces, here called `bases`: a dictionary from the name of a space to its
orthogonal matrix. `JacobianSparsity` connects two spaces, possibly the same one (a tied fit); `ActivationSparsity`
looks at one; `WeightedSum` adds them up, and that is all a chain of layers needs.

The gradient is the *relative* one: the skew-symmetric `Γ` with `F(expm(Ω) R) = F(R) + <Γ, Ω> + O(Ω²)`. For
`Z = R_out J R_inᵀ` and `G = ∂F/∂Z` it is `Γ_out = skew(E[G Zᵀ])`, `Γ_in = skew(E[Gᵀ Z])`: it needs Z itself and nothing
else of the layer, so every layer has a closed-form gradient, nothing of size [n, d_out, d_in] is kept (each chunk's Z
is made, used and forgotten), and for an MLP block with d_hidden = 4 d the gradient costs a third of what
backpropagation through `(R_out L) diag(g) (M R_inᵀ)` would.
"""

from rotsparse.objectives.activation import ActivationSparsity as ActivationSparsity
from rotsparse.objectives.base import Bases as Bases
from rotsparse.objectives.base import Objective as Objective
from rotsparse.objectives.combined import Held as Held
from rotsparse.objectives.combined import WeightedSum as WeightedSum
from rotsparse.objectives.jacobian import JacobianSparsity as JacobianSparsity
