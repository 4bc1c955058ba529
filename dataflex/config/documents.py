"""Documents of settings: YAML or JSON as OmegaConf reads it, and `key=value` over it."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigTypeError, OmegaConfBaseException

from dataflex.config.secrets import keep_written_secrets
from gradstore.errors import BadInput
from gradstore.format.foreign import MOST_NESTED, TOO_DEEP, read_json

#: Characters of an override that a message shows.
_SHOWN = 60

#: Where a path in the home folder begins: in a text, and in a comma string of words without blanks
#: (a sentence, such as a system prompt, may speak of `~/` behind a comma).
_HOME = re.compile(r"^()~(?=/)")
_HOMES = re.compile(r"(^|,\s*)~(?=/)")
_COMMA_STRING = re.compile(r"[^\s,]+(\s*,\s*[^\s,]+)+")


@contextlib.contextmanager
def faults_of(what: str) -> Iterator[None]:
    """Convert what reading a document raises to BadInput that begins with `what`."""
    try:
        yield
    except FileNotFoundError as error:
        raise BadInput(f"{what} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{what} cannot be read: {error}") from error
    except RecursionError as error:  # aliases nest without a bracket
        raise BadInput(f"{what}: {TOO_DEEP}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>", line', "in line")
        raise BadInput(f"{what}: {reason}") from error


def read_settings(path: Path) -> DictConfig | ListConfig:
    """Read a file of settings, JSON by its suffix and YAML otherwise.

    Raises:
        Exception: as `faults_of` converts it.
    """
    text = path.read_text(encoding="utf-8-sig")
    keep_written_secrets(text)
    settings: DictConfig | ListConfig
    if path.suffix == ".json":
        settings = OmegaConf.create(read_json(text))
    else:
        _check_nesting(text)
        settings = OmegaConf.load(io.StringIO(text))
    return settings


def check_form(overrides: Sequence[str]) -> None:
    """Raise BadInput for an override that is not `key=value`: no file need be read to say so."""
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise BadInput(f"{_named(override)} is not key=value.")


def overridden(settings: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply `key=value` and `key.inner=value`, in their order.

    A value takes the place of the whole former one, a mapping too; a dotted key sets one entry.

    Raises:
        BadInput: a value is no YAML, or cannot be set there.
    """
    for override in overrides:
        key, _, text = override.partition("=")
        keep_written_secrets(override)
        with faults_of(_named(override)):
            _check_nesting(text)
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
            try:
                OmegaConf.update(settings, key, value, merge=False)
            except ConfigTypeError:  # an entry of what is null so far
                settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([override]))  # type: ignore[assignment]
    return settings


def at_home(value: Any) -> Any:  # noqa: ANN401 - YAML values
    """Replace the `~/` that a text begins with by the user's home folder, in lists and mappings.

    No shell does so for a value in a file, and for few words of a command line. In a comma string
    of paths each part counts; in a sentence nothing does.

    >>> at_home({"a": "a, ~/b", "b": ["~c", 3]}) == {"a": f"a, {Path.home()}/b", "b": ["~c", 3]}
    True
    """
    if isinstance(value, str):
        begins = _HOMES if _COMMA_STRING.fullmatch(value) else _HOME
        return begins.sub(lambda found: f"{found[1]}{Path.home()}", value)
    if isinstance(value, dict):
        return {key: at_home(each) for key, each in value.items()}
    return [at_home(each) for each in value] if isinstance(value, list) else value


def _named(override: str) -> str:
    """Quote an override, or the beginning of a long one."""
    shown = override if len(override) <= _SHOWN else f"{override[:_SHOWN]}..."
    return f"override {shown!r}"


def _check_nesting(text: str) -> None:
    """Refuse YAML that nests too deeply before a parser that recurses sees it.

    Raises:
        ValueError: it does.
        yaml.YAMLError: it is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise ValueError(TOO_DEEP)
