"""The amount that LlamaFactory and transformers say: warnings alone, or with `--verbose` all.

One environment variable carries the choice, `LLAMAFACTORY_VERBOSITY`: LlamaFactory reads it when it
is imported, sets transformers by it, and the workers of a run inherit it. One that the user has set
is left alone, and so is `TRANSFORMERS_VERBOSITY`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from dataflex.bridge.arguments import swapped
from dataflex.config.secrets import redacted

VERBOSITY = "LLAMAFACTORY_VERBOSITY"

#: Seconds after which tqdm shows a bar: reading and tokenising a small set shows none. The bar of
#: training has none: written beside within them, it would be left without the end of its line.
DELAY, DELAY_SECONDS = "TQDM_DELAY", "2"

#: Logger, and the beginning of what it says of LlamaFactory's own code, where no user can mend it.
_NOT_FOR_USERS = ("transformers.configuration_utils", "`torch_dtype` is deprecated")

#: The same of advice about training, which nobody wants who asks a trained model.
_OF_TRAINING = ("llamafactory.hparams.parser", "We recommend enable")


def choose_verbosity(verbose: bool) -> None:
    """Let LlamaFactory and transformers speak as they do by themselves, or only warn.

    To be called before either is imported.
    """
    if not verbose:
        os.environ.setdefault(VERBOSITY, "WARNING")
        os.environ.setdefault(DELAY, DELAY_SECONDS)


@contextlib.contextmanager
def as_chosen() -> Iterator[None]:
    """Apply the choice to LlamaFactory, also where something had imported it before.

    It prints a row of each data set to stdout, text and token ids, by no logger: without its INFO,
    that is left out too.
    """
    from llamafactory.data import loader
    from llamafactory.extras import logging as theirs
    from tqdm.auto import tqdm
    from transformers import trainer_callback

    theirs.get_logger()
    level = theirs._get_default_logging_level()
    logging.getLogger("llamafactory").setLevel(level)
    if level <= logging.INFO:
        yield
        return
    processor_for = loader._get_dataset_processor

    def silent_processor_for(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        processor = processor_for(*args, **kwargs)
        processor.print_data_example = _say_nothing
        return processor

    bar = functools.partial(tqdm, delay=0)
    with (
        _without(*_NOT_FOR_USERS),
        swapped(loader, "_get_dataset_processor", silent_processor_for),
        swapped(trainer_callback, "tqdm", bar),
    ):
        loader.print = _say_nothing  # before the built-in of that name, in that module alone
        try:
            yield
        finally:
            del loader.print


@contextlib.contextmanager
def of_questions() -> Iterator[None]:
    """Apply the choice to a model that is asked, not trained; its lines go to stderr."""
    with on_stderr(), as_chosen(), contextlib.ExitStack() as stack:
        if logging.getLogger("llamafactory").level > logging.INFO:
            stack.enter_context(_without(*_OF_TRAINING))
        yield


@contextlib.contextmanager
def _without(logger: str, beginning: str) -> Iterator[None]:
    """Leave out what one logger says with these first words."""
    theirs = logging.getLogger(logger)

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    theirs.addFilter(wanted)
    try:
        yield
    finally:
        theirs.removeFilter(wanted)


@contextlib.contextmanager
def on_stderr() -> Iterator[None]:
    """Let LlamaFactory log to stderr, where stdout is for an answer; its own choice is stdout."""
    from llamafactory.extras import logging as theirs

    theirs.get_logger()
    handlers = logging.getLogger("llamafactory").handlers
    streams = [each for each in handlers if isinstance(each, logging.StreamHandler)]
    before = [each.stream for each in streams]
    for each in streams:
        each.setStream(sys.stderr)
    try:
        yield
    finally:
        for each, stream in zip(streams, before, strict=True):
            each.setStream(stream)


def _say_nothing(*_: object) -> None:
    pass


@contextlib.contextmanager
def lines_on_the_page() -> Iterator[None]:
    """Show our own lines where LlamaBoard shows LlamaFactory's, in a run that it started."""
    if os.environ.get("LLAMABOARD_ENABLED") != "1":
        yield
        return
    handler = _OnThePage()
    ours = logging.getLogger("dataflex")
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


class _OnThePage(logging.Handler):
    """Handler that hands lines to the file which LlamaFactory's callback opens for the page."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, if the file is open."""
        from llamafactory.extras.logging import LoggerHandler

        line = logging.makeLogRecord(record.__dict__)
        line.msg, line.args = redacted(record.getMessage()), None
        for handler in logging.getLogger("llamafactory").handlers:
            if isinstance(handler, LoggerHandler):
                handler.handle(line)
