"""Products with the Gauss-Newton matrix of the trained parameters, and systems solved with it.

With J_s the derivative of the logits at target token s by the parameters, p_s its probabilities and
T_i the target tokens of row i,

    G = 1/N sum over rows i of 1/T_i sum over tokens s of J_s^T (diag(p_s) - p_s p_s^T) J_s,

which is the Hessian of the rows' mean loss without the curvature of the logits themselves, and is
never negative along any direction. A product G v is made of three parts: J v by forward-mode
differentiation, the loss's Hessian at the logits, J^T by a backward (Schraudolph 2002, "Fast
curvature matrix-vector products for second-order gradient descent", section 3).

Letters: N rows, b rows of a batch, s target tokens of a batch, V vocabulary, p gradient length,
q directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradstore.capture.losses import RowLoss, Targets
from gradstore.capture.modelstate import borrowed, without_autocast
from gradstore.capture.slots import unwrap
from gradstore.errors import BadInput

#: (m, p) directions -> (m, p) their products with a symmetric matrix that is never negative.
Product = Callable[[Tensor], Tensor]


class GaussNewton:
    """The matrix G of some rows at a model's present state.

    Args:
        model: a causal language model; its parameters that require grad now are those of G, in the
            order of `trainable_slots`. It is evaluated in eval mode, and given back as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        model = unwrap(model)
        self._model = model
        self._logits = _TargetLogits(model)
        self._parameters = {n: p for n, p in self._logits.named_parameters() if p.requires_grad}
        self.p = sum(parameter.numel() for parameter in self._parameters.values())

    def summed(self, batches: Iterable[Mapping[str, Tensor]], vectors: Tensor) -> Tensor:
        """Sum N G v over batches.

        Args:
            batches: inputs (b, t) of the model and `labels` (b, t), right-padded, on its device; a
                row without a target token adds nothing.
            vectors: (q, p).

        Returns:
            (q, p) float64.

        Raises:
            BadInput: the model has an operation without a forward-mode derivative.
        """
        total = torch.zeros_like(vectors, dtype=torch.float64)
        # The fused kernels of torch's attention have no forward-mode derivative.
        with borrowed(self._model, freeze=True), sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                targets = Targets.of(batch)
                if len(targets.rows):
                    self._add(batch, targets, vectors, total)
        return total

    def _add(
        self, batch: Mapping[str, Tensor], targets: Targets, vectors: Tensor, total: Tensor
    ) -> None:
        """Add a batch's part to (q, p) `total`."""
        values = {name: p.detach().requires_grad_() for name, p in self._parameters.items()}
        with torch.enable_grad():
            logits = functional_call(self._logits, values, (batch, targets))
        if not logits.requires_grad:
            return
        odds = logits.detach().float().softmax(dim=1)  # (s, V)
        weights = targets.weights()[:, None]
        for vector, part in zip(vectors, total, strict=True):
            moved = self._forward(batch, targets, vector)
            if moved is None:
                continue
            moved = moved.float()
            mean = (odds * moved).sum(dim=1, keepdim=True)
            bent = (weights * odds * (moved - mean)).to(logits.dtype)
            with without_autocast(logits.device):
                found = torch.autograd.grad(
                    logits, list(values.values()), bent, retain_graph=True, allow_unused=True,
                    materialize_grads=True,
                )  # fmt: skip
            part += torch.cat([block.reshape(-1).double() for block in found])

    def _forward(
        self, batch: Mapping[str, Tensor], targets: Targets, vector: Tensor
    ) -> Tensor | None:
        """Compute J v (s, V) of one direction (p,); None where the logits do not move."""
        parts = torch.split(vector, [p.numel() for p in self._parameters.values()])
        with _forward_mode(), torch.no_grad():
            moving = {
                name: forward_ad.make_dual(p.detach(), part.view(p.shape).to(p.dtype))  # type: ignore[no-untyped-call]
                for (name, p), part in zip(self._parameters.items(), parts, strict=True)
            }
            logits = functional_call(self._logits, moving, (batch, targets))
            moved: Tensor | None = forward_ad.unpack_dual(logits).tangent  # type: ignore[no-untyped-call]
        return moved


class _TargetLogits(nn.Module):
    """A model's logits at the target tokens, as a module whose parameters can be replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.rows = RowLoss(model)

    def forward(self, batch: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return self.rows.logits(batch, targets)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Differentiate forwards, and explain what torch says of a model that cannot be.

    Raises:
        BadInput: in the place of torch's error.
    """
    try:
        with warnings.catch_warnings(), forward_ad.dual_level():
            # At its first use torch loads its own rules, which it compiles in a way it deprecates.
            warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
            yield
    except (RuntimeError, NotImplementedError) as error:
        told = str(error)
        if "forward AD" not in told and "forward mode" not in told and "jvp" not in told:
            raise
        raise BadInput(
            f"Gauss-Newton products need forward-mode derivatives, which this model does not have: "
            f"{told}. Load it with attn_implementation eager (flash_attn: disabled) and without "
            "fused kernels (liger, unsloth), or rank by: exact."
        ) from error


@dataclass(frozen=True)
class Solution:
    """Directions x with (G + l I) x = t, as far as conjugate gradients came.

    Attributes:
        x: (q, p) float64.
        level: l, what is added to G's diagonal.
        curvature: mean over targets of t^T G t / t^T t, of which l is a multiple.
        iterations: products with G that were made.
        residual: largest norm of t - (G + l I) x over that of t.
        converged: whether it is within the tolerance.
    """

    x: Tensor
    level: float
    curvature: float
    iterations: int
    residual: float
    converged: bool


def conjugate_gradients(
    product: Product,
    targets: Tensor,
    *,
    damping: float,
    tolerance: float = 1e-3,
    iterations: int = 50,
    tell: Callable[[int], object] = lambda made: None,
) -> Solution:
    """Solve (G + l I) x = t for each target by conjugate gradients (Hestenes and Stiefel 1952).

    l is `damping` times the mean curvature along the targets themselves, t^T G t / t^T t, which
    the first product gives. Unlike the mean eigenvalue, the trace over p, it does not fall with the
    number of parameters while G's rank stays that of its rows. A target counts alike whatever its
    length.

    Args:
        product: with G.
        targets: (q, p).
        damping: above 0.
        tolerance: of the residual's norm over the target's.
        iterations: products to be made at most, at least 1.
        tell: called with 1 after each product.

    Raises:
        BadInput: damping is not above 0; G has no curvature along any target, or a negative one;
            something is not finite.
    """
    if not damping > 0:
        raise BadInput(f"damping is {damping}: {SINGULAR}")
    systems = _Systems(targets.double().clone(), tolerance)
    level = curvature = 0.0
    made = 0
    while made < iterations and bool(systems.open.any()):
        bent = product(systems.way[systems.open])
        made += 1
        tell(1)
        if made == 1:
            curvature = systems.curvature(bent)
            level = damping * curvature
        if not systems.step(bent, level):
            raise BadInput(
                f"conjugate gradients broke down at product {made}: the Gauss-Newton matrix is not "
                "finite, or rounding makes it negative; raise damping, or rank by: exact."
            )
    converged = not bool(systems.open.any())
    return Solution(systems.x, level, curvature, made, systems.residual, converged)


class _Systems:
    """Systems of one matrix, on their way: each has its own step, and is left once it is solved.

    Args:
        rest: (q, p) float64, the targets; overwritten with t - (G + l I) x.
        tolerance: of a residual's norm over its target's.

    Raises:
        BadInput: no target that is not 0, or one that is not finite.
    """

    def __init__(self, rest: Tensor, tolerance: float) -> None:
        self.x, self.rest, self.way = torch.zeros_like(rest), rest, rest.clone()
        self._square = self._whole = rest.square().sum(dim=1)
        self._enough = tolerance**2 * self._whole
        self.open = self._whole > 0  # a target of zeros is solved by zeros
        if not bool(torch.isfinite(self._whole).all()) or not bool(self.open.any()):
            raise BadInput("the target's gradient is zero or not finite: nothing to solve for.")

    @property
    def residual(self) -> float:
        """The largest norm of what is left of a target, over the target's."""
        some = self._whole > 0
        return float((self._square[some] / self._whole[some]).max().sqrt())

    def curvature(self, bent: Tensor) -> float:
        """Return the mean of t^T G t / t^T t, given G t of the open systems at their start.

        Raises:
            BadInput: it is not above 0, or not finite.
        """
        along = (self.way[self.open] * bent).sum(dim=1) / self._square[self.open]
        found = float(along.mean())
        if not 0 < found < float("inf"):
            raise BadInput(
                f"the Gauss-Newton matrix's curvature along the target is {found:.3g}, and damping "
                "is a multiple of it: the model's answers to the curvature rows do not move along "
                "the target's gradient. Raise curvature_rows, or rank by: exact."
            )
        return found

    def step(self, bent: Tensor, level: float) -> bool:
        """Take a step along each open system's way; false where the matrix shows to be none.

        Args:
            bent: G times the ways of the open systems.
            level: l.
        """
        at, way, before = self.open, self.way[self.open], self._square[self.open]
        bent = bent + level * way
        length = before / (way * bent).sum(dim=1)
        self.x[at] += length[:, None] * way
        self.rest[at] -= length[:, None] * bent
        self._square = self.rest.square().sum(dim=1)
        self.way[at] = self.rest[at] + (self._square[at] / before)[:, None] * way
        self.open = self._square > self._enough
        return bool(torch.isfinite(self._square).all()) and bool((length > 0).all())


#: Why damping may not be 0.
SINGULAR = (
    "the Gauss-Newton matrix of fewer rows than parameters is singular, so that its system has no "
    "solution; give one above 0, such as 0.1"
)
