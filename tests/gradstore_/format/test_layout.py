"""Names, paths, sizes and documents of a store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.format import layout
from gradstore.format.names import GenerationName, check_space, quote

names = st.text(min_size=1, max_size=12).filter(lambda t: t not in ("train", "target"))


@given(names, st.none() | names, st.integers(0, 10**9), st.integers(1, 9))
def test_a_generation_name_reads_back_whatever_the_sets_are_called(
    run: str, set_name: str | None, step: int, attempt: int
) -> None:
    for prefix in ("", run):
        name = GenerationName(
            "train" if set_name is None else "target", step, set_name or "", prefix, attempt
        )
        assert GenerationName.parse(str(name)) == name
        assert ".." not in str(name).split("/")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "train",
        "train/x",
        "train/01",
        "train/1.0",
        "train/1.1",
        "train/-1",
        "/train/1",
        "train/1/",
        "../train/1",
        "a/b/train/1",
        "target/1",
        "target/./1",
        "target/a/b/1",
        "target/a%2e/1",
        "other/1",
    ],
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        GenerationName.parse(text)


def test_a_set_may_be_called_train_and_a_run_may_not() -> None:
    assert GenerationName.parse("target/train/5").set == "train"
    with pytest.raises(BadInput, match="can't be named 'train'"):
        GenerationName("train", 1, run="train")


def test_names_that_no_folder_can_bear_are_refused() -> None:
    with pytest.raises(BadInput, match="can't name"):
        quote("")
    with pytest.raises(BadInput, match="can't name"):
        quote("x" * 200)
    for space in ("", "..", "a/b", ".hidden", "é"):
        with pytest.raises(BadInput, match="space"):
            check_space(space)


def test_the_zarr_json_of_an_array_is_pinned() -> None:
    spec = layout.arrays(8, "float16")[0]
    assert layout.array_json(spec, 300, 256) == (
        b'{"attributes":{},"chunk_grid":{"configuration":{"chunk_shape":[256,8]},"name":"regular"},'
        b'"chunk_key_encoding":{"configuration":{"separator":"/"},"name":"default"},'
        b'"codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"name":"crc32c"}],'
        b'"data_type":"float16","fill_value":"NaN","node_type":"array","shape":[300,8],'
        b'"storage_transformers":[],"zarr_format":3}'
    )
    assert spec.chunk_bytes(256) == 256 * 8 * 2 + 4


def test_a_generation_needs_at_least_its_features() -> None:
    assert layout.generation_bytes(1000, 64) > 1024 * 64 * 2
    assert layout.generation_bytes(1_000_000, 4096) < 1_000_000 * 4096 * 2 * 1.05


def test_a_root_of_another_making_is_a_value_error() -> None:
    for version, needs in layout.NEEDS.items():
        assert layout.read_root(layout.root_json("u", version)) == (version, "u", needs)
    for data in (
        b"",
        b"{}",
        layout.group_json(),
        layout.root_json("u") + b" ",
        layout.root_json("u").replace(b'"u"', b'"v"'),
    ):
        with pytest.raises(ValueError, match=r"."):
            layout.read_root(data)
