"""`dataflex-cli`: one function per command. Heavy imports happen inside the command."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from dataflex.bridge.quiet import choose_verbosity
from dataflex.launch.options import (
    Builders,
    Config,
    Evaluated,
    Explained,
    Repair,
    Replayed,
    Verbose,
)
from dataflex.run.messages import DEBUG, Failure, end_bars, explain, set_up_logging, show_traceback
from gradstore import cli as gradstore_cli
from gradstore.cli import care, serving
from gradstore.cli.options import AsJson
from gradstore.format.names import printable

if TYPE_CHECKING:
    from gradstore.serve.served import Explainer
    from gradstore.storage.location import Location

HELP = "Train an LLM while its data changes: select, mix, weight, on LlamaFactory."

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(gradstore_cli.app, name="gradstore")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, over the file's.", metavar="[KEY=VALUE]...")
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show a traceback for every failure; any command takes it.")
]
Version = Annotated[bool, typer.Option("--version", help="Print the version of DataFlex.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check all, measure a few rows, print a forecast."),
]

#: What Typer answers for Ctrl-C (or raises Abort, by version).
INTERRUPTED = 130

#: llamafactory-cli's other commands, passed through unchanged.
PASSED_THROUGH = {
    "api": "OpenAI-style API server (llamafactory-cli).",
    "chat": "Chat in the terminal (llamafactory-cli).",
    "eval": "Evaluate a model (llamafactory-cli).",
    "export": "Merge adapters and export a model (llamafactory-cli).",
    "webchat": "Chat in a web page (llamafactory-cli).",
    "env": "Show the environment (llamafactory-cli).",
}


@app.callback(help=HELP, invoke_without_command=True)
def options(debug: Debug = False, show_version: Version = False) -> None:
    """Declare the options of all commands; `main` strips `--debug` from any command's arguments."""
    if show_version:
        version()
        raise typer.Exit


class TrainHelp(TyperCommand):
    """The help of a command, and every key that its CONFIG may hold."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - click's
        """Print the command's help, then the keys."""
        from dataflex.launch.manual import key_lines

        super().format_help(ctx, formatter)
        for line in key_lines(shutil.get_terminal_size().columns):
            typer.echo(line)


@app.command(cls=TrainHelp)
def train(
    config: Config, overrides: Overrides = None, dry_run: DryRun = False, verbose: Verbose = False
) -> None:
    """Train; train_type in CONFIG says what decides about the data (static = LlamaFactory).

    KEY=VALUE takes the place of the whole value in CONFIG, KEY.INNER=VALUE sets one entry of it.
    """
    choose_verbosity(verbose)
    from dataflex.launch.configuration import read

    checked = read(config, overrides or [])
    from dataflex.launch.train import train as launch  # imports torch

    launch(checked, overrides or [], dry_run=dry_run)


@gradstore_cli.app.command("build")
@gradstore_cli.with_options(Builders)
def build(
    builders: Builders,
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Write the train and target generations of CONFIG's checkpoints, without training."""
    choose_verbosity(verbose)
    worker, ray = builders.chosen()
    from dataflex.launch.configuration import read

    checked = read(config, overrides or [])
    from dataflex.launch.build import build as run  # imports torch

    run(checked, dry_run=dry_run, worker=worker, ray=ray)


@gradstore_cli.app.command("repair")
@gradstore_cli.with_options(Repair)
def repair(asked: Repair, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Verify a store; say which rows are damaged, and make whole what can be.

    With CONFIG, that of the store's run or build, damaged rows are computed again. Bytes go back
    only where they are the committed ones.
    """
    recompute = None
    if asked.config is not None and not asked.dry_run:
        choose_verbosity(verbose)
        from dataflex.launch.configuration import read

        checked = read(asked.config, overrides or [])
        from dataflex.launch.repaired import recompute as run  # imports torch

        recompute = partial(run, checked, asked.new_attempt)
    care.repair_told(asked.store, recompute, dry_run=asked.dry_run, as_json=asked.as_json)


@gradstore_cli.app.command("explain")
@gradstore_cli.with_options(Explained)
def explain_answer(
    question: Explained,
    changes: Overrides = None,
    top: Annotated[int, typer.Option(help="Rows to show on each side.")] = 10,
    why: Annotated[
        int | None, typer.Option(help="Training row whose influence is taken apart.", metavar="ROW")
    ] = None,
    output: gradstore_cli.Output = None,
    as_json: AsJson = False,
) -> None:
    """Show which training rows taught the model an answer, and which opposed it.

    KEY=VALUE takes the place of what the store recorded of LlamaFactory's keys (dataset_dir, ...).
    """
    choose_verbosity(question.verbose)
    from dataflex.launch.asked import Asked, explain, questions_of

    options = {field.name: getattr(question, field.name) for field in fields(question)}
    questions = questions_of(*(options.pop(name) for name in ("prompt", "response", "file")))
    asked = Asked(questions=questions, top=top, why=why, output=output, as_json=as_json)
    explain(options.pop("store"), asked, options, changes or [])


@gradstore_cli.app.command("eval")
@gradstore_cli.with_options(Evaluated)
def evaluate(
    asked: Evaluated,
    overrides: Overrides = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure how far scores can be trusted, by retraining, a replay or planted rows."""
    choose_verbosity(verbose)
    from dataflex.launch.configuration import read

    options = {field.name: getattr(asked, field.name) for field in fields(asked)}
    checked = read(options.pop("config"), overrides or [])
    from dataflex.launch.evaluated import Evaluation  # imports torch
    from dataflex.launch.evaluated import evaluate as run

    run(checked, Evaluation(**options, as_json=as_json))


@gradstore_cli.app.command("replay")
@gradstore_cli.with_options(Replayed)
def replay(
    asked: Replayed,
    overrides: Overrides = None,
    rows: Annotated[
        str, typer.Option(help="Training rows to list, such as 0,3,10-19; default: all.")
    ] = "",
    top: Annotated[int, typer.Option(help="Rows to show on each side.")] = 5,
    output: gradstore_cli.Output = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Train CONFIG's run once, and differentiate it: the exact influence of each training row."""
    choose_verbosity(verbose)
    from dataflex.launch.configuration import read

    checked = read(asked.config, overrides or [])
    from dataflex.launch.replay_shown import Shown, choices  # imports torch
    from dataflex.launch.replay_shown import replay as run

    shown = Shown(rows=rows, output=output, top=top, as_json=as_json, dry_run=dry_run)
    run(
        checked,
        choices(asked.targets, asked.float32, asked.segment, asked.hours, asked.memory),
        shown,
    )


def _model_at_hand(store: Location) -> Explainer:
    choose_verbosity(False)
    from dataflex.launch.serving import ModelAtHand

    return ModelAtHand(store)


serving.open_explainer = _model_at_hand


@app.command()
def components(as_json: AsJson = False) -> None:
    """List every strategy and preset with its parameters, their values and what they accept."""
    from dataflex.launch.components import catalogue, show

    if as_json:
        gradstore_cli.print_json(catalogue())
    else:
        show(catalogue())


@app.command()
def webui() -> None:
    """Open LlamaBoard; a run whose "extra arguments" have keys of DataFlex goes through it."""
    from dataflex.launch.webui import open_page

    open_page()


@app.command()
def version() -> None:
    """Print the version of DataFlex."""
    from dataflex import __version__

    typer.echo(f"dataflex-gradstore {__version__}")


def main() -> None:
    """Run the console script: a failure is one message and its exit code."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in PASSED_THROUGH:
        from dataflex.bridge.running import passthrough

        passthrough(arguments)
        return
    set_up_logging()
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    if debug:
        os.environ[DEBUG] = "1"  # for the processes of torchrun
    words = [word for word in arguments if word != "--debug"]
    try:
        code = int(app(words, standalone_mode=False) or 0)
        if code != INTERRUPTED:
            return code
        failure = _interrupted(words)
    except (typer.Abort, KeyboardInterrupt):
        failure = _interrupted(words)
    except Exception as error:
        if hasattr(error, "show"):
            error.show()  # a wrong option or command: click's own message
            return int(getattr(error, "exit_code", 2))
        failure = explain(error)
        if failure is None:
            raise
        if debug:
            show_traceback(type(error), error, error.__traceback__)
    if failure is None:
        return 1
    end_bars()
    typer.echo(f"error: {printable(failure.message)}", err=True)
    return failure.code


def _interrupted(words: list[str]) -> Failure | None:
    """Say how to go on after Ctrl-C; training alone has checkpoints."""
    if words[:1] == ["gradstore"]:
        return Failure(INTERRUPTED, "interrupted. Run the same command again.")
    return explain(KeyboardInterrupt())


def _passed_through(name: str, text: str) -> None:
    @app.command(name, help=text, context_settings={"ignore_unknown_options": True})
    def _listed(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        from dataflex.bridge.running import passthrough

        passthrough([name, *(arguments or [])])


for _name, _text in PASSED_THROUGH.items():
    _passed_through(_name, _text)
