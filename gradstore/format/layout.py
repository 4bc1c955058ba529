"""Paths, names and sizes of everything in a store; no disk access here.

docs/store-format.md walks the tree. What is on disk is compared with what this module would write,
byte for byte, before any array is opened: so a store can't talk a reader into other codecs, shapes
or places. Letters: n rows, d projected dimensions, u the number of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.canonical import canonical_json, parse, sha256_json

#: Schema of a store's documents, and of a store that keeps neither text nor losses.
SCHEMA_VERSION = 1
#: Schema of a store from the first commit on that adds a table of text.
TEXTS_VERSION = 2
#: Schema of a store from the first generation on that keeps the losses of its rows.
LOSSES_VERSION = TEXTS_VERSION
#: Schema of a store from the first generation on whose rows are in none of `FIRST_DTYPES`.
DTYPES_VERSION = TEXTS_VERSION
#: Schema of a store from the first removal of rows on that somebody asked for.
FORGOTTEN_VERSION = 3
#: Schema -> the first release that reads it; recorded in a store for the errors of older ones.
NEEDS = {
    SCHEMA_VERSION: "dataflex-gradstore>=0.1.0",
    TEXTS_VERSION: "dataflex-gradstore>=0.2.0",
    FORGOTTEN_VERSION: "dataflex-gradstore>=0.2.0",
}

UNIT_ROWS = 256
CRC_BYTES = 4
BLOCK_BYTES = 4096
MAX_DIM = 1 << 24
MAX_UNIT_ROWS = 1 << 20
METADATA = "zarr.json"
COMMITS = "commits"
GENERATIONS = "generations"
PLANS = "plans"
SPACES = "spaces"
INDEX = "index"
#: What follows the commit's sha256 in the folder name of each kind of index.
INDEX_KINDS = ("", ".ivf")
#: Factors of the metrics that features were put into, a file each.
CURVATURE = "curvature"
FORGOTTEN = "forgotten"
#: The space of gradient features; every other space holds embeddings of one model.
GRADIENT = "gradient"

#: Feature kind of a generation of embeddings.
EMBEDDING = "embedding"


class RowStatus(IntEnum):
    """Status of a row; only `OK` rows are ever scored or selected."""

    OK = 0
    MASKED = 1
    NON_FINITE = 2
    ZERO_NORM = 3
    TOO_LONG = 4
    FORGOTTEN = 5


# ---- arrays ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArraySpec:
    """One array of a generation: (n,) if `width` is None, else (n, width).

    Attributes:
        name: folder name.
        dtype: NumPy and Zarr name of the stored type.
        width: values per row, or None for a one-dimensional array.
        fill: what pads the last chunk, and Zarr's fill_value.
    """

    name: str
    dtype: str
    width: int | None
    fill: Literal["NaN", 0]

    @property
    def item_bytes(self) -> int:
        """Bytes per value."""
        return np.dtype(self.dtype).itemsize

    def chunk_shape(self, unit_rows: int) -> tuple[int, ...]:
        """Return the shape of every chunk, including the last one."""
        return (unit_rows,) if self.width is None else (unit_rows, self.width)

    def chunk_bytes(self, unit_rows: int) -> int:
        """Return the exact size of every chunk's file: the values and 4 bytes of crc32c."""
        return unit_rows * (self.width or 1) * self.item_bytes + CRC_BYTES

    def chunk_path(self, unit: int) -> str:
        """Return the path of a chunk relative to the generation."""
        return f"{self.name}/c/{unit}" if self.width is None else f"{self.name}/c/{unit}/0"


#: What features may be stored as, the most exact last.
FeatureDtype = Literal["1bit", "int8", "bfloat16", "float16", "float32"]
#: Those that every schema has.
FIRST_DTYPES = ("float16", "bfloat16")
#: Feature dtype -> (stored dtype, fill): bfloat16 is kept as its bits, Zarr has no such type, and
#: 1bit as 8 dimensions to a byte.
FEATURE_DTYPES: Mapping[str, tuple[str, Literal["NaN", 0]]] = {
    "1bit": ("uint8", 0),
    "int8": ("int8", 0),
    "bfloat16": ("uint16", 0),
    "float16": ("float16", "NaN"),
    "float32": ("float32", "NaN"),
}
_NO_FLOATS = ("1bit", "int8")


def check_dtype(dtype: str) -> str:
    """Return `dtype` if features can be stored in it; else raise BadInput with the choices."""
    if dtype not in FEATURE_DTYPES:
        raise BadInput(
            f"features can't be stored as {dtype!r}; choose {' | '.join(get_args(FeatureDtype))}"
        )
    return dtype


def dtype_of_role(dtype: str, role: Literal["train", "target"]) -> str:
    """Return what the rows of a role are stored as in a space whose train rows are `dtype`.

    Target rows are queries, and few: they stay float where the train rows are not.
    """
    return "float16" if role == "target" and dtype in _NO_FLOATS else dtype


def arrays(dim: int, dtype: str, losses: bool = False) -> tuple[ArraySpec, ...]:
    """List the arrays of a generation of (n, dim) features, features first; losses where kept."""
    stored, fill = FEATURE_DTYPES[check_dtype(dtype)]
    width = -(-dim // 8) if dtype == "1bit" else dim
    found = (
        ArraySpec("features", stored, width, fill),
        ArraySpec("scale", "float32", None, "NaN"),
        ArraySpec("norm", "float32", None, "NaN"),
        ArraySpec("status", "uint8", None, 0),
        ArraySpec("tokens", "int32", None, 0),
        ArraySpec("row_hash", "uint8", 16, 0),
    )
    return (*found, ArraySpec("loss", "float32", None, "NaN")) if losses else found


def generation_bytes(
    rows: int, dim: int, dtype: str = "float16", unit_rows: int = UNIT_ROWS
) -> int:
    """Compute the bytes on disk of a generation of `rows`, each file rounded up to whole blocks."""
    per_unit = [spec.chunk_bytes(unit_rows) for spec in arrays(dim, dtype, losses=True)]
    blocks = sum(-(-size // BLOCK_BYTES) for size in per_unit)
    record_and_folders = 3
    units = -(-rows // unit_rows)
    fixed = 32 + -(
        -rows * 64 // BLOCK_BYTES
    )  # zarr.json files, folders, the plan's hex, the commit
    return (units * (blocks + record_and_folders) + fixed) * BLOCK_BYTES


# ---- zarr.json -------------------------------------------------------------------------------


def array_json(spec: ArraySpec, rows: int, unit_rows: int) -> bytes:
    """Build the zarr.json of one array: unsharded, uncompressed, checked by crc32c."""
    wide = {"configuration": {"endian": "little"}} if spec.item_bytes > 1 else {}
    shape = [rows] if spec.width is None else [rows, spec.width]
    return canonical_json(
        {
            "attributes": {},
            "chunk_grid": {
                "configuration": {"chunk_shape": spec.chunk_shape(unit_rows)},
                "name": "regular",
            },
            "chunk_key_encoding": {"configuration": {"separator": "/"}, "name": "default"},
            "codecs": [{"name": "bytes", **wide}, {"name": "crc32c"}],
            "data_type": spec.dtype,
            "fill_value": spec.fill,
            "node_type": "array",
            "shape": shape,
            "storage_transformers": [],
            "zarr_format": 3,
        }
    )


def group_json(attributes: Mapping[str, object] | None = None) -> bytes:
    """Build the zarr.json of a group."""
    return canonical_json({"attributes": attributes or {}, "node_type": "group", "zarr_format": 3})


def root_json(store_uuid: str, version: int = SCHEMA_VERSION) -> bytes:
    """Build the store's own zarr.json."""
    body = {"needs": NEEDS[version], "schema_version": version, "store_uuid": store_uuid}
    return group_json({**body, "check": sha256_json(body)})


def read_root(data: bytes) -> tuple[int, str, str]:
    """Read the store's own zarr.json.

    Returns:
        Schema version, store uuid, and the release that reads it.

    Raises:
        ValueError: it is not what some release of gradstore wrote.
    """
    attributes = parse(data).get("attributes")
    if not isinstance(attributes, dict):
        raise ValueError("no attributes")
    body = {key: value for key, value in attributes.items() if key != "check"}
    version, uuid, needs = (body.get(key) for key in ("schema_version", "store_uuid", "needs"))
    if attributes.get("check") != sha256_json(body):
        raise ValueError("its attributes do not fit their sha256")
    if type(version) is not int or not isinstance(uuid, str) or not isinstance(needs, str):
        raise ValueError("schema_version, store_uuid or needs is missing")
    if version < 1 or (version in NEEDS and data != root_json(uuid, version)):
        raise ValueError("other bytes than gradstore writes")
    return version, uuid, needs


# ---- paths -----------------------------------------------------------------------------------


def generation_path(name: str) -> str:
    """Return the path of a generation's folder."""
    return f"{GENERATIONS}/{name}"


def plan_path(name: str) -> str:
    """Return the path of the file of a generation's plan."""
    return f"{PLANS}/{name}.json"


def unit_path(name: str, unit: int) -> str:
    """Return the path of the file of a unit's record."""
    return f"{GENERATIONS}/{name}/units/{unit}.json"


def provenance_path(space: str) -> str:
    """Return the path of the provenance file that all generations of a space share."""
    return f"{SPACES}/{space}/provenance.json"


def commit_path(number: int) -> str:
    """Return the path of the file of the commit of this number, from 1."""
    return f"{COMMITS}/{number}.json"


def request_path(number: int) -> str:
    """Return the path of the file that asks for the removal of rows, from 1."""
    return f"{FORGOTTEN}/{number}.request.json"


def receipt_path(number: int) -> str:
    """Return the path of the file that says that a removal is complete."""
    return f"{FORGOTTEN}/{number}.receipt.json"


def group_paths(name: str) -> list[str]:
    """List the folders that need a zarr.json: a generation and those above it, outermost first."""
    parts = generation_path(name).split("/")
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
