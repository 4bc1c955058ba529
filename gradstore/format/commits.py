"""The commit log: `commits/<N>.json`, a hash chain that nothing but `os.link` can add to.

Commit N names its parent's sha256 and carries its own (its seal), so an edit anywhere breaks the
chain there. There is no mutable HEAD: the newest commit is the highest N of an unbroken chain. A
commit adds one whole generation, or the text of one row set, or retires what clean-up removes next.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from gradstore.errors import BadInput
from gradstore.format.canonical import plain, sealed, unseal
from gradstore.format.layout import SCHEMA_VERSION, TEXTS_VERSION
from gradstore.format.names import GenerationName
from gradstore.format.text_table import TextTable
from gradstore.format.typed import sha256, text, whole

_KINDS = ("generation", "retire", "texts")


@dataclass(frozen=True)
class Commit:
    """One link of the chain.

    Attributes:
        number: N, from 1.
        store_uuid: the store it belongs to.
        parent: sha256 of commit N-1, None for the first.
        kind: `generation` adds one, `texts` the text of a row set, `retire` takes some back.
        generations: the full names it adds or retires.
        plan_sha256: seal of the added generation's plan; "" for `retire`.
        units: seal of each unit record of the added generation, in order.
        chunk_bytes: bytes of the added generation's chunks.
        texts: the tables of text that it adds or retires; from schema 2 on.
    """

    number: int
    store_uuid: str
    parent: str | None
    kind: Literal["generation", "retire", "texts"]
    generations: tuple[str, ...]
    plan_sha256: str = ""
    units: tuple[str, ...] = ()
    chunk_bytes: int = 0
    texts: tuple[TextTable, ...] = ()

    def _sealed(self) -> tuple[bytes, str]:
        """Spell the document, of schema 1 as far as that has words for it; with its seal."""
        body = {each.name: getattr(self, each.name) for each in fields(self)}
        body["texts"] = [table.to_dict() for table in self.texts]
        if not self.texts:
            del body["texts"]
        version = TEXTS_VERSION if self.texts else SCHEMA_VERSION
        return sealed(plain({"schema_version": version, **body}))

    def to_bytes(self) -> bytes:
        """Return the bytes of the commit's file."""
        return self._sealed()[0]

    @cached_property
    def sha256(self) -> str:
        """The commit's seal, by which indexes and checkpoints name it."""
        return self._sealed()[1]

    @property
    def generation(self) -> str:
        """The generation it adds."""
        return self.generations[0]

    @classmethod
    def from_bytes(cls, data: bytes) -> Commit:
        """Read a commit; raise ValueError when the bytes are not exactly one."""
        document = unseal(data)
        try:
            commit = cls(
                number=document["number"],
                store_uuid=document["store_uuid"],
                parent=document["parent"],
                kind=document["kind"],
                generations=tuple(document["generations"]),
                plan_sha256=document["plan_sha256"],
                units=tuple(document["units"]),
                chunk_bytes=document["chunk_bytes"],
                texts=tuple(TextTable.from_dict(each) for each in document.get("texts", ())),
            )
            same = commit.to_bytes() == data
            commit._check_types()
        except (KeyError, TypeError, AttributeError, BadInput) as error:
            raise ValueError(f"not a commit: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"not a commit: {error}") from error
        if not same or commit.kind not in _KINDS or not commit._says_what_its_kind_says():
            raise ValueError("not a commit of this schema")
        return commit

    def _check_types(self) -> None:
        """Raise ValueError or BadInput where a value is not of its type, whoever has sealed it."""
        whole(self.number, "number", least=1)
        text(self.store_uuid, "store_uuid")
        if self.parent is not None:
            sha256(self.parent, "parent")
        for name in self.generations:
            GenerationName.parse(name)
        if self.kind == "generation":
            sha256(self.plan_sha256, "plan_sha256")
        text(self.plan_sha256, "plan_sha256")
        for seal in self.units:
            sha256(seal, "the seal of a unit")
        whole(self.chunk_bytes, "chunk_bytes")

    def _says_what_its_kind_says(self) -> bool:
        if self.kind == "texts":
            return not self.generations and len(self.texts) == 1 and bool(self.texts[0].parts)
        if self.kind == "generation":
            return len(self.generations) == 1 and not self.texts
        return bool(self.generations or self.texts) and not any(t.parts for t in self.texts)
