"""Documents of settings: overrides that replace, home folders, nesting that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataflex.config.documents import at_home
from dataflex.config.keys import load
from dataflex.config.presets import presets_of
from gradstore.errors import BadInput

ACCEPTED = ("output_dir", "adapter_name_or_path", "dataset_dir", "optim_args")
TEXT = "output_dir: a\ncomponent_params: {proj_dim: 8, inner: {x: 1, y: 2}}\noptim_args:\n"


def run(folder: Path, *overrides: str, text: str = TEXT, name: str = "run.yaml") -> Any:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load(path, overrides, ACCEPTED)


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        (["component_params={seed: 3}"], {"seed": 3}),
        (["component_params={}"], {}),
        (["component_params.seed=3"], {"proj_dim": 8, "inner": {"x": 1, "y": 2}, "seed": 3}),
        (["component_params.inner={z: 3}"], {"proj_dim": 8, "inner": {"z": 3}}),
        (["component_params.inner.x=3"], {"proj_dim": 8, "inner": {"x": 3, "y": 2}}),
        (["component_params={seed: 3}", "component_params.proj_dim=4"], {"seed": 3, "proj_dim": 4}),
        (["component_params.proj_dim=4", "component_params={seed: 3}"], {"seed": 3}),
    ],
)
def test_an_override_replaces_a_whole_value_and_a_dotted_one_sets_an_entry(
    overrides: list[str], left: dict[str, Any], tmp_path: Path
) -> None:
    assert run(tmp_path, *overrides).dataflex.component_params == left


def test_an_override_reaches_into_what_is_null_or_missing(tmp_path: Path) -> None:
    text = "output_dir: a\ncomponent_params:\n"
    config = run(tmp_path, "component_params.proj_dim=8", "optim_args.rank=2", text=text)
    assert config.dataflex.component_params == {"proj_dim": 8}
    assert config.llamafactory["optim_args"] == {"rank": 2}


def test_an_override_may_hold_a_placeholder_and_signs_of_equality(tmp_path: Path) -> None:
    config = run(tmp_path, "gradstore=${output_dir}/s", "optim_args=a=1,b=2")
    assert config.store_path == Path("a/s")
    assert config.llamafactory["optim_args"] == "a=1,b=2"


def test_every_path_may_begin_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    config = run(
        tmp_path,
        "component_params={embedding_model_name_or_path: ~/encoder, score_params: {path: ~/s.npy}}",
        "gradstore_checkpoints=[~/one, ~/two]",
        "components_cfg_file=~/mine.yaml",
        text="output_dir: ~/out\ngradstore: ~/store\ndataset_dir: ~/data\n"
        "adapter_name_or_path: ~/a, ~/b\n",
    )
    ours, theirs = config.dataflex, config.llamafactory
    assert ours.component_params == {
        "embedding_model_name_or_path": "/h/encoder",
        "score_params": {"path": "/h/s.npy"},
    }
    assert ours.gradstore_checkpoints == ("/h/one", "/h/two")
    assert (str(ours.presets_file), str(config.store_path)) == ("/h/mine.yaml", "/h/store")
    assert theirs == {
        "output_dir": "/h/out", "dataset_dir": "/h/data", "adapter_name_or_path": "/h/a, /h/b",
    }  # fmt: skip


def test_paths_of_presets_may_begin_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/h")
    path = tmp_path / "components.yaml"
    path.write_text("selectors: {mine: {name: near, params: {path: ~/x}}}")
    assert presets_of("selectors", path)["mine"]["params"] == {"path": "/h/x"}


#: Depth by depth through aliases, without a bracket inside another.
ALIASES = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))

NESTED = {
    "lists": "a: " + "[" * 50_000,
    "closed lists": "a: " + "[" * 150 + "]" * 150,
    "mappings": "a: " + "{b: " * 50_000,
    "blocks": "- " * 50_000,
    "lines": "".join(f"{' ' * i}a:\n" for i in range(1_500)),
    "aliases": ALIASES,
    "aliases of themselves": "a: &a [*a]",
}


@pytest.mark.parametrize("case", NESTED)
def test_yaml_that_nests_too_deeply_is_one_message(case: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        run(tmp_path, text=NESTED[case])
    assert str(refused.value).startswith("configuration '")
    assert len(str(refused.value)) < 1000
    path = tmp_path / "run.yaml"
    with pytest.raises(BadInput, match=r"^components_cfg_file '"):
        presets_of("selectors", path)


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a": ' * 50_000, "[" * 200 + "]" * 200])
def test_json_that_nests_too_deeply_is_one_message(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nests more than 100 lists or mappings"):
        run(tmp_path, text=text, name="run.json")


@pytest.mark.parametrize(
    "override",
    ["component_params=" + "[" * 50_000, "component_params=" + "{a: " * 200,
     ".".join(["component_params"] * 20_000) + "=1"],
)  # fmt: skip
def test_an_override_that_nests_too_deeply_is_one_short_message(
    override: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"^override 'component_params.*nest") as refused:
        run(tmp_path, override)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("~/a", "{home}/a"),
        ("~/my models/a", "{home}/my models/a"),
        ("a, ~/b,~/c", "a, {home}/b,{home}/c"),
        ("In bash, ~/ is the home folder.", "In bash, ~/ is the home folder."),
        ("~other/a", "~other/a"),
    ],
)
def test_a_path_in_the_home_folder_is_found_and_a_sentence_about_it_is_left(
    text: str, becomes: str
) -> None:
    assert at_home(text) == becomes.format(home=Path.home())
