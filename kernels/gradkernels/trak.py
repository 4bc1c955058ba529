"""The projector interface of TRAK, over these kernels: one changed line in a TRAK or LESS script.

    projector = Projector(grad_dim=p, proj_dim=4096, seed=0, proj_type="rademacher", device="cpu")
    traker = TRAKer(model=..., projector=projector, ...)

TRAK's matrices have entries +-1 or N(0, 1), so its results are sqrt(d) times ours. The bits of the
matrices differ: a store of the one can't be continued with the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from gradkernels.dispatch import Accumulator
from gradkernels.spec import MAX_SEED, Method, ProjectionSpec
from torch import Tensor

#: TRAK's names of projections -> ours; sjlt is not among TRAK's.
METHODS: dict[str, Method] = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt"}
#: Seeds of two checkpoints lie as far apart as in TRAK.
SEEDS_APART = 10_000


class Projector:
    """A projector as `trak.projectors` has them (TRAK, arXiv 2303.14186, section 3.2).

    Takes any number of rows at once, in any batches, and needs no memory for a matrix.

    Args:
        grad_dim: p, gradient length.
        proj_dim: d, projected dimensions.
        seed: of the matrix of model 0.
        proj_type: "normal", "rademacher" or "sjlt", or a member of TRAK's `ProjectionType`. Normal
            entries are slow on a CPU: 1.5 to 6.5 s a row at p = 4.9 million and d = 4,096, where
            signs take 0.1 to 0.2 (64 and 8 rows at once, two cores).
        device: where gradients come from and results go.
        max_batch_size: accepted as TRAK's projectors have it, and so are all further arguments
            (`block_size`, `dtype`, ...); nothing here depends on them.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number outside its limits, an unknown projection or device.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str,
        device: str | torch.device,
        max_batch_size: int | None = None,
        *_args: object,
        **_options: object,
    ) -> None:
        name = str(getattr(proj_type, "value", proj_type))
        if name not in METHODS:
            raise ValueError(f"proj_type={name!r} is not one of {', '.join(METHODS)}")
        self.grad_dim, self.proj_dim, self.seed = grad_dim, proj_dim, seed
        self.proj_type, self.device = name, torch.device(device)
        self._spec = ProjectionSpec(METHODS[name], p=grad_dim, d=proj_dim, seed=seed)

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:
        """Project gradients with the matrix of a checkpoint.

        Args:
            grads: (b, p), any float type; or a parameter's name -> (b, ...), in gradient order.
            model_id: of the checkpoint, from 0; each has a matrix of its own.

        Returns:
            (b, d) float32, of entries +-1 (or standard normal) times gradients: not divided by
            sqrt(d).

        Raises:
            TypeError: a gradient is no floating-point tensor.
            ValueError: shapes do not fit, or model_id is negative.
        """
        if not 0 <= model_id <= (MAX_SEED - self.seed) // SEEDS_APART:
            raise ValueError(f"model_id={model_id} is below 0 or too large for seed={self.seed}")
        blocks = list(grads.values()) if isinstance(grads, Mapping) else [grads]
        spec = self._spec.with_seed(self.seed + SEEDS_APART * model_id)
        rows = len(blocks[0]) if blocks else 0
        sums = Accumulator(spec, rows, device=self.device)
        start = 0
        for block in blocks:
            flat = block if isinstance(grads, Tensor) else block.reshape(len(block), -1)
            sums.add(flat.to(self.device), start)
            start += flat.shape[1]
        if start != self.grad_dim:
            raise ValueError(f"gradients have {start} entries a row, not grad_dim={self.grad_dim}")
        return sums.result() * math.sqrt(self.proj_dim)

    def free_memory(self) -> None:
        """Do nothing: no matrix is held."""
