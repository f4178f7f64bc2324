"""Objectives: functions of rotations that are minimised.

An *activation space* (the input of a layer, its output, the residual stream) has a name and one rotation. An objective
is a function of the rotations of some spaces, called `bases`: a dictionary from the name of a space to its orthogonal
matrix. `JacobianSparsity` depends on two spaces, possibly the same one (a tied fit); `ActivationSparsity` depends on
one; `WeightedSum` adds objectives, for example those of a chain of layers.

The gradient is the *relative* one: the skew-symmetric `Γ` with `F(expm(Ω) R) = F(R) + <Γ, Ω> + O(Ω²)`. For
`Z = R_out J R_inᵀ` and `G = ∂F/∂Z` it is `Γ_out = skew(E[G Zᵀ])`, `Γ_in = skew(E[Gᵀ Z])`, which depends on the layer
only through Z. So every layer has a closed-form gradient, Z is held for one chunk of examples at a time, and for an MLP
block with d_hidden = 4 d the gradient costs a third of backpropagation through `(R_out L) diag(g) (M R_inᵀ)`.
"""

from rotsparse.objectives.activation import ActivationSparsity as ActivationSparsity
from rotsparse.objectives.base import Bases as Bases
from rotsparse.objectives.base import Objective as Objective
from rotsparse.objectives.combined import Held as Held
from rotsparse.objectives.combined import WeightedSum as WeightedSum
from rotsparse.objectives.jacobian import JacobianSparsity as JacobianSparsity
