"""A test of the Triton kernels against plain torch, before they are first used on a device.

Imports Triton only inside functions: plain torch must stay usable without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from gradkernels.features import Feature, FeatureKind
from gradkernels.methods import doing, sums_of
from gradkernels.spec import MAX_P, Method, ProjectionSpec
from torch import Tensor

_log = logging.getLogger(__name__)

CAPABILITY = (8, 0)  # older tensor cores take no left operand from registers
#: Of the test: every program takes several chains, the last one a part of one; the last tile of
#: outputs is none in full.
_PARAMS, _OUTPUTS = 6500, 4000
#: Whole numbers up to these are exact in the type, their sums exact in float32; 13 bits of a
#: float32 take both of its parts. Plain torch adds 2,048 of them in float32: below 2**24.
_LARGEST = {torch.float32: 2**13 - 1, torch.float16: 2**11 - 1, torch.bfloat16: 2**8 - 1}
#: Of a row's norm, that sums of rounded features may differ by, or of its square. A wrong number
#: among `_PARAMS` is about 1 / sqrt(_PARAMS) of the one, 1 / _PARAMS of the other.
_ROUNDING = 1e-5
#: Numbers of a row that one program can hold in registers.
LARGEST_TRANSFORM = 2**14


def refusal(device: torch.device, method: Method, kind: FeatureKind | None = None) -> str | None:
    """Return a reason why the kernels may not run on a CUDA device, or None; ask once, warn once.

    Where memory runs out while they are tested, that is raised, and nothing is known of them yet.

    All widths are tested together: were one of them left out, a row's features would come from
    other kernels in a smaller batch.

    Args:
        device: with an index or without, which stands for the current one.
        method: the projection's.
        kind: of the feature that is made as gradients are read; None projects what it is given.
    """
    if method not in doing("triton"):
        return f"they do {' and '.join(doing('triton'))}"
    index = index_of(device)
    return _unusable(index) or _tested(index, method, kind)


def rotation_refusal(device: torch.device, dim: int) -> str | None:
    """Return a reason why rows of d numbers may not be rotated on a CUDA device, or None.

    That memory is full is one for this time: the processor gives the same bits.
    """
    if dim >= 2 * LARGEST_TRANSFORM:
        return f"a transform takes {LARGEST_TRANSFORM:,} numbers of a row at most"
    index = index_of(device)
    try:
        return _unusable(index) or _rotation_tested(index)
    except Exception as error:
        if not _memory_ran_out(error):
            raise
        return "memory is full"


def index_of(device: torch.device) -> int:
    """Return the index of a CUDA device; of one without, that of the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def _unusable(index: int) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(index) < CAPABILITY:
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    return None


@cache
def _tested(index: int, method: Method, kind: FeatureKind | None) -> str | None:
    """Test the kernels of every width on a device, and warn where they fail."""

    def compare() -> str | None:
        from gradkernels.gpu.launching import WIDTHS

        device = torch.device("cuda", index)
        found = (difference(device, method, width, kind) for width in WIDTHS)
        return next((each for each in found if each is not None), None)

    what = method if kind is None else f"{method} with {kind} features"
    return _verdict(index, what, compare, "Plain torch computes there: the same features, many")


@cache
def _rotation_tested(index: int) -> str | None:
    """Test the kernel of rotations on a device, and warn where it fails."""
    device = torch.device("cuda", index)
    return _verdict(
        index, "rotations", lambda: rotation_difference(device), "The processor computes: many"
    )


def _verdict(index: int, what: str, compare: Callable[[], str | None], instead: str) -> str | None:
    """Return how kernels differ, as `compare` finds it, or why they do not run; warn of either.

    Raises that memory ran out, which says nothing of the kernels: a verdict is kept.
    """
    try:
        why = compare()
    except Exception as error:  # whatever a compiler or a driver may raise
        if _memory_ran_out(error):
            raise
        _log.debug("gradkernels: the Triton kernels of %s", what, exc_info=True)
        why = f"they do not run: {type(error).__name__}: {error}".strip()
    if why is not None:
        _log.warning(
            "gradkernels: the Triton kernels of %s are not used on %s, since %s. %s times slower.",
            what, torch.cuda.get_device_name(index), why, instead,
        )  # fmt: skip
    return why


def _memory_ran_out(error: Exception) -> bool:
    """Return whether an error is torch's, the driver's or the host's of a full memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "out of memory" in str(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def rotation_difference(device: torch.device, dims: tuple[int, ...] = (4096, 1500)) -> str | None:
    """Return how rotated rows differ from the processor's, which have the same bits, or None."""
    from gradkernels.gpu.rotation import rotated
    from gradkernels.rotation import SEED, rotate

    for dim in dims:
        x = (_whole_numbers(5, dim, 2**13 - 1, device) / 3.0).float()
        found, expected = rotated(x, SEED).cpu(), torch.from_numpy(rotate(x.cpu().numpy()))
        wrong = (found != expected).nonzero().tolist()
        if wrong:
            row, at = wrong[0]
            return (
                f"{len(wrong)} of {found.numel()} numbers differ from the processor's, first row "
                f"{row}, number {at} of {dim}: {found[row, at].item()} instead of "
                f"{expected[row, at].item()}"
            )
    return None


def difference(
    device: torch.device,
    method: Method,
    width: int,
    kind: FeatureKind | None = None,
    params: int = _PARAMS,
    outputs: int = _OUTPUTS,
) -> str | None:
    """Return how the kernels' sums and squared norms differ from plain torch's, or None.

    Sums of whole numbers and of signs are computed without rounding: a single wrong sign shows, in
    every float type that the kernels take. Features of Adam are rounded, and so are squared norms:
    they are compared with that in mind.

    Args:
        device: where both run.
        method: one that both have.
        width: rows of a product, one of the kernels' `WIDTHS`.
        kind: of the feature; None for none.
        params: the largest indices that a projection may have, so many of them.
        outputs: d.
    """
    spec = ProjectionSpec(method, p=MAX_P, d=outputs, seed=20)
    start, cut, rows = MAX_P - params, params // 3 + 1, width - 3
    feature = None if kind is None else _feature(kind, params, device)
    # Quarters of whole numbers: as exact. A share of a step, in an export, is such a factor.
    factors = None if kind is None else torch.full((rows,), 0.25, device=device)
    for dtype, largest in _LARGEST.items():
        x = _whole_numbers(rows, params, largest, device).to(dtype)
        ours, plain = (sums_of(method, of)(spec, rows, device) for of in ("triton", "torch"))
        squares = torch.zeros(rows, dtype=torch.float64, device=device)
        for low, high in ((0, cut), (cut, params)):
            part = feature and feature.part(low, high)
            ours.add(x[:, low:high], start + low, part, factors)
            y = x[:, low:high].float()
            if part is not None:
                y = part.apply_(y * 0.25)
            plain.add(y, start + low)
            squares += y.double().square().sum(dim=1)
        rounding = _ROUNDING if kind in ("adam", "adam_marginal") else 0.0
        squares = squares[:, None]
        pairs = (
            ("sums", ours.total(), plain.total(), rounding * squares.sqrt()),
            ("squared norms", ours.squares()[:, None], squares, _ROUNDING * squares),
        )
        for name, found, expected, allowed in pairs:
            wrong = (~((found - expected).abs() <= allowed)).nonzero().tolist()
            if wrong:
                row, at = wrong[0]
                return (
                    f"{len(wrong)} of {found.numel()} {name} of {dtype} differ from torch's, first "
                    f"row {row}, output {at}: {found[row, at].item()} instead of "
                    f"{expected[row, at].item()}"
                )
    return None


def _feature(kind: FeatureKind, params: int, device: torch.device) -> Feature:
    """Return a feature whose vectors are far from regular, of gradients about 1,000 in size."""
    if kind == "sign":
        return Feature(kind)
    a, base = _whole_numbers(2, params, 1000, device).float()
    base = base.square() + 1.0
    if kind == "adam":
        return Feature(kind, a=a, base=base, curve=0.1, outer=0.5)
    still = base.sqrt()
    return Feature(kind, base=base, still=still, pull=a * 0.1 / (still + 0.5), curve=0.1, outer=0.5)


def _whole_numbers(rows: int, params: int, largest: int, device: torch.device) -> Tensor:
    """Return (rows, params) float64 whole numbers from -largest to largest, far from regular."""
    at = torch.arange(rows * params, dtype=torch.int64, device=device)
    mixed = (at * at % 65_521 * 31 + at * 7) % (2 * largest + 1)
    return (mixed - largest).double().view(rows, params)
