"""Pictures of processed rows: opened for another model, identified without opening them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.data.rows import Rows
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from gradstore.export.units import Batch

#: Columns of a processed row that name its pictures.
PICTURES = ("images", "videos")


def have_pictures(rows: Rows) -> bool:
    """Return whether any row has an image."""
    columns = [c for c in PICTURES if c in rows.dataset.column_names]
    return bool(columns) and any(
        row[c] for row in rows.dataset.select_columns(columns) for c in columns
    )


class TextsWithPictures(Sequence[tuple[str, list[Any]]]):
    """Rows as (text, pictures): what another model can be shown."""

    def __init__(self, rows: Rows, tokenizer: Any, visual_ids: Sequence[int]) -> None:  # noqa: ANN401
        self._rows, self._tokenizer, self._visual_ids = rows, tokenizer, set(visual_ids)

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - one row at a time
        """Return the text without special and image tokens, and the opened images."""
        row = self._rows.dataset[int(index)]
        ids = [i for i in row["input_ids"] if i not in self._visual_ids]
        text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        return text, [opened(picture) for picture in row.get("images") or ()]


def shown_batch(processor: Any, items: Sequence[tuple[str, list[Any]]]) -> Batch:  # noqa: ANN401
    """Convert (text, pictures) of b rows to the model's inputs, padded on the right."""
    texts = [_asked(processor, text, len(pictures)) for text, pictures in items]
    flat = [picture for _, pictures in items for picture in pictures]
    batch = processor(text=texts, images=flat or None, padding=True, return_tensors="pt")
    return dict(batch)


def _asked(processor: Any, text: str, pictures: int) -> str:  # noqa: ANN401
    """Format one user turn by the chat template, or as image tokens and text if there is none."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": text}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}]))
    return f"{processor.image_token * pictures}\n{text}"


def opened(picture: Any) -> Any:  # noqa: ANN401 - a path, bytes, or a picture
    """Open an image as LlamaFactory stores it, as an RGB image.

    Raises:
        BadInput: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    source = picture
    if isinstance(picture, Mapping):
        held = picture.get("bytes")
        source = BytesIO(held) if held is not None else picture.get("path")
    elif isinstance(picture, bytes):
        source = BytesIO(picture)
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, AttributeError) as error:
        raise BadInput(f"a picture of the training rows cannot be read: {error}") from error


def pictures_hash(rows: Rows) -> str:
    """Compute the sha256 of what is known of unopened images: names and sizes, in order.

    Rows are hashed by their tokens, which are the same whatever a picture shows.
    """
    digest = hashlib.sha256()
    columns = [c for c in PICTURES if c in rows.dataset.column_names]
    for row in rows.dataset.select_columns(columns) if columns else ():
        for column in columns:
            for picture in row[column] or ():
                digest.update(_known(picture))
        digest.update(b"\n")
    return digest.hexdigest()


def _known(picture: Any) -> bytes:  # noqa: ANN401 - a path, bytes, or a picture
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str):
        path = Path(picture)
        size = path.stat().st_size if path.is_file() else -1
        return f"{path.name}:{size};".encode()
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).digest()
    return repr(getattr(picture, "size", picture)).encode()
