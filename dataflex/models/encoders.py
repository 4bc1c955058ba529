"""Text encoders that are not trained: a sentence-transformers folder, or any encoder's.

A sentence-transformers folder says how its vectors are made (`modules.json`,
`1_Pooling/config.json`) and is run by that library; any other folder is run by transformers, its
states averaged. Texts are tokenised with the encoder's own tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.config.values import names_a_folder
from dataflex.data.rows import Rows
from dataflex.models.encoder_library import check_library, load_by_library
from gradstore.errors import BadInput
from gradstore.export.pooling import HiddenStates, Pooling
from gradstore.format.foreign import read_json
from gradstore.storage.hashing import hash_folder_files

if TYPE_CHECKING:
    import torch

    from gradstore.export.units import Batch

#: Files of a folder that decide what its encoder answers.
DECIDING = ("*.json", "*.txt", "*.model", "*.safetensors")

#: Modes of 1_Pooling/config.json -> our pooling; a mean's scale does not change its direction.
POOLINGS: dict[str, Pooling] = {
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean",
    "cls": "first_token",
    "lasttoken": "last_token",
    "weightedmean": "position",
}

#: What older folders have in place of `pooling_mode`: a switch for each mode.
SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_max_tokens": "max",
}

#: Values of `embedding_model_dtype` -> torch's names; `auto` is the folder's own.
DTYPES = {"auto": "auto", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Encoder:
    """Description of an encoder, read from its folder; no weight is loaded yet.

    Attributes:
        folder: where its config, weights and tokenizer lie.
        dim: d, length of its vectors.
        layers: hidden states it has, the embedding layer's included.
        pooling: how token states become one vector.
        max_tokens: longer texts are cut.
        lower_case: texts are lowered first.
        prompt: put before every text.
        by_library: whether sentence-transformers runs it.
    """

    folder: Path
    dim: int
    layers: int
    pooling: Pooling
    max_tokens: int
    lower_case: bool
    prompt: str
    by_library: bool = False

    @cached_property
    def sha256(self) -> str:
        """Hash of the files that decide what it answers, whatever the folder is called."""
        files = hash_folder_files(self.folder, DECIDING)
        settings = {"pooling": self.pooling, "max_tokens": self.max_tokens,
                "lower_case": self.lower_case, "prompt": self.prompt, "files": files}  # fmt: skip
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def find_encoder(name: str, *, trust_remote_code: bool = False) -> Encoder:
    """Read a folder, or fetch a hub id and read it.

    Raises:
        BadInput: it is neither, holds something this can't do, or brings code that is not trusted.
    """
    return read_encoder(find_folder(name), trust_remote_code=trust_remote_code)


def find_folder(name: str) -> Path:
    """Return a model's folder, or the folder fetched for a hub id.

    Raises:
        BadInput: it is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if names_a_folder(name):
        raise BadInput(
            f"embedding_model_name_or_path {name!r} is not a folder here: name an encoder's folder "
            "or a hub id."
        )
    return _fetch(name)


def read_encoder(folder: Path, *, trust_remote_code: bool = False) -> Encoder:
    """Read the description of an encoder from its folder.

    Raises:
        BadInput: it is unreadable, needs a module that is unknown here, code that is not trusted,
            or a package that is not installed.
    """
    where, pooling = folder, POOLINGS["mean"]
    by_library = (folder / "modules.json").exists()
    if by_library:
        where, pooling = _modules(folder)
        check_library(folder)
    content = _json(where / "config.json", needed=True)
    if "auto_map" in content and not trust_remote_code:
        raise BadInput(
            f"the embedding model in {str(folder)!r} brings its own code (auto_map in "
            "config.json). If you trust it, set trust_remote_code: true; none of it was run."
        )
    if not any(where.glob("*.safetensors")):
        raise BadInput(
            f"the embedding model in {str(where)!r} has no *.safetensors; other formats of "
            "weights are not opened."
        )
    if content.get("is_encoder_decoder"):
        raise BadInput(
            f"the embedding model in {str(folder)!r} is an encoder-decoder; choose a model whose "
            "hidden states come from one stack."
        )
    text = content.get("text_config", content)
    ours = _json(where / "sentence_bert_config.json")
    limits = (ours.get("max_seq_length"),
              _json(where / "tokenizer_config.json").get("model_max_length"),
              text.get("max_position_embeddings"))  # fmt: skip
    try:
        dim, layers = int(text["hidden_size"]), int(text["num_hidden_layers"]) + 1
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"config.json of the embedding model in {str(folder)!r} lacks {error}."
        ) from error
    prompts = _json(folder / "config_sentence_transformers.json")
    return Encoder(
        where,
        dim=dim,
        layers=layers,
        pooling=pooling,
        max_tokens=min((int(limit) for limit in limits if limit), default=512),
        lower_case=bool(ours.get("do_lower_case", False)),
        prompt=str((prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")) or ""),
        by_library=by_library,
    )


def _modules(folder: Path) -> tuple[Path, Pooling]:
    """Read the transformer's folder and its pooling from modules.json."""
    where, pooling = folder, None
    for module in _json(folder / "modules.json", needed=True):
        kind, path = str(module["type"]).rpartition(".")[2], folder / module["path"]
        if kind == "Transformer":
            where = path
        elif kind == "Pooling":
            pooling = _pooling(path)
        elif kind != "Normalize":
            raise BadInput(
                f"the embedding model in {str(folder)!r} has a module {kind!r}; supported are "
                "Transformer, Pooling and Normalize."
            )
    if pooling is None:
        raise BadInput(f"modules.json in {str(folder)!r} has no Pooling.")
    return where, pooling


def _pooling(path: Path) -> Pooling:
    settings = _json(path / "config.json", needed=True)
    modes = settings.get("pooling_mode") or [
        SWITCHES.get(key, key) for key, on in settings.items() if key.startswith("pooling_") and on
    ]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise BadInput(
            f"the embedding model pools by {', '.join(modes) or 'nothing'} ({str(path)!r}); "
            f"supported is one of {', '.join(POOLINGS)}."
        )
    return POOLINGS[modes[0]]


def _json(path: Path, *, needed: bool = False) -> Any:  # noqa: ANN401 - a mapping, or a list
    """Read a JSON file; return an empty mapping where it is missing and not needed."""
    if not needed and not path.exists():
        return {}
    try:
        return read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{str(path)!r} of the embedding model cannot be read: {error}") from error


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*DECIDING, "*/config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"embedding_model_name_or_path {name!r} is no folder and cannot be fetched: {reason} "
            "Give the path of a folder."
        ) from error


class Texts(Sequence[str]):
    """Rows as texts: what the training tokenizer decodes them to, without special tokens."""

    def __init__(self, rows: Rows, tokenizer: Any, encoder: Encoder) -> None:  # noqa: ANN401
        self._rows, self._tokenizer, self._encoder = rows, tokenizer, encoder

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - one row at a time
        """Return the text of row `index`."""
        ids = self._rows.dataset[int(index)]["input_ids"]
        text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        return self._encoder.prompt + (text.lower() if self._encoder.lower_case else text)


class TextEncoder:
    """An encoder in memory: texts -> batch -> unit vectors."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        dtype: str,
        layer: int,
        device: torch.device,
        trust_remote_code: bool = False,
    ) -> None:
        """Load weights and tokenizer.

        Raises:
            BadInput: they can't be.
        """
        load = load_by_library if encoder.by_library else _load
        try:
            self._tokenizer, self._states = load(
                encoder.folder,
                dtype=DTYPES[dtype],
                layer=layer,
                pooling=encoder.pooling,
                device=device,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, ImportError) as error:
            raise BadInput(
                f"the embedding model in {str(encoder.folder)!r} cannot be loaded: {error}"
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._max_tokens = encoder.max_tokens

    def collate(self, texts: list[str]) -> Batch:
        """Tokenize texts with the encoder's own settings into padded token ids (b, t)."""
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        return dict(batch)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Compute (b, d) float32 unit rows."""
        return self._states({k: v for k, v in batch.items() if k != "special_tokens_mask"})

    @staticmethod
    def tokens_of(batch: Batch) -> torch.Tensor:
        """Count (b,) tokens of the text itself; a row with none has no content."""
        return (batch["attention_mask"] * (1 - batch["special_tokens_mask"])).sum(dim=1)


def _load(
    folder: Path,
    *,
    dtype: str,
    layer: int,
    pooling: Pooling,
    device: torch.device,
    trust_remote_code: bool,
) -> tuple[Any, HiddenStates]:
    """Load as `load_by_library` does, with transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    model = AutoModel.from_pretrained(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    return tokenizer, HiddenStates(model.to(device), layer=layer, pooling=pooling)
