"""Definition of a projection matrix: the few numbers that determine every one of its bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from gradkernels.methods import entry_of

#: The names in `methods.TABLE`.
Method = Literal["rademacher", "gaussian", "sjlt", "trak"]

VERSION = 1
MAX_P = 2**31 - 1  # parameter indices are 32-bit counters on every device
MAX_D = 2**24
MAX_SEED = 2**63 - 1  # so that a seed survives JSON readers and int64 columns


@dataclass(frozen=True)
class ProjectionSpec:
    """A (d, p) random matrix, as a pure function of these fields (never of device or batch).

    Attributes:
        method: "rademacher" (entries +-1/sqrt(d)), "gaussian" (entries N(0, 1)/sqrt(d)), "sjlt"
            (s entries +-1/sqrt(s) per parameter; Kane & Nelson 2014, block construction) or "trak"
            (entries +-1, those of TRAK's own code on a CPU; slow: to compare with it).
        p: gradient length, 1 <= p <= 2**31 - 1.
        d: projected dimensions, 1 <= d <= 2**24.
        seed: 0 <= seed < 2**63.
        s: non-zeros per parameter, 1 <= s; used by "sjlt" alone, where s <= d. Below 4 the error
            has heavy tails: keep the default.
        version: of the algorithm; another version is another matrix.

    Raises:
        TypeError: a number is not an int.
        ValueError: a value is outside its limits, which the message names.
    """

    method: Method
    p: int
    d: int
    seed: int = 0
    s: int = 8
    version: int = VERSION

    def __post_init__(self) -> None:
        sparse = entry_of(self.method).sparse
        _check_range("p", self.p, 1, MAX_P)
        _check_range("d", self.d, 1, MAX_D)
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("s", self.s, 1, MAX_D)
        _check_range("version", self.version, 1, VERSION)
        if sparse and self.s > self.d:
            raise ValueError(
                f"s={self.s} exceeds d={self.d}: the s non-zeros of a parameter fall in distinct "
                f"outputs; choose s <= {self.d}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        >>> ProjectionSpec("sjlt", p=10, d=8).to_dict()
        {'method': 'sjlt', 'p': 10, 'd': 8, 'seed': 0, 's': 8, 'version': 1}
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProjectionSpec:
        """Build a spec from `to_dict`'s mapping.

        Raises:
            TypeError: no mapping.
            ValueError: keys are missing or unknown; all of them are named.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"projection is a {type(values).__name__}; give a mapping of fields")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        missing = [name for name in ("method", "p", "d") if name not in values]
        if unknown or missing:
            raise ValueError(
                f"projection: unknown keys {unknown}, missing keys {missing}; "
                f"accepted: {', '.join(known)}"
            )
        return cls(**values)

    def with_seed(self, seed: int) -> ProjectionSpec:
        """Return the same projection with another seed (one per checkpoint averages noise out)."""
        return replace(self, seed=seed)


def check_spec(spec: object) -> None:
    """Raise TypeError unless a projection is a `ProjectionSpec`."""
    if not isinstance(spec, ProjectionSpec):
        raise TypeError(
            f"spec is a {type(spec).__name__}; give a ProjectionSpec (ProjectionSpec.from_dict "
            "makes one of a mapping)"
        )


def check_int(name: str, value: object) -> None:
    """Raise TypeError unless value is an int (no bool)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not an int")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise unless value is an int (no bool) with low <= value <= high."""
    check_int(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is outside {low}..{high}")
