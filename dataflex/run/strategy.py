"""The contract of every strategy, whatever it decides: needs, checks, life cycle, state."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dataflex.config.parameters import checked
from dataflex.config.registry import target_of
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from dataflex.data.rows import RunData
    from dataflex.run.context import DomainLosses, RunContext
    from dataflex.run.forecast import Forecast

S = TypeVar("S", bound="Strategy")

FSDP = "FSDP"
"""A model's parameters sharded by FSDP: a member of `Strategy.whole_model`."""
ZERO3 = "DeepSpeed ZeRO-3"
"""The same by DeepSpeed's ZeRO-3."""


class Strategy:
    """Base of selectors, mixers, weighters, reorders and pipelines.

    The constructor's keyword parameters are the accepted `component_params`, its annotations their
    types and limits, its docstring their documentation. A value that an annotation refuses is
    refused however the strategy is built; the constructor itself checks only how parameters relate
    to each other. A constructor that a decorator adds, such as `@dataclass`, is checked where a
    configuration is read; in Python too, if `dataflex.config.parameters.checked` decorates the
    class last.

    Every method but `check` and `state` is called on every rank, so that passes over the data are
    shared (`context.run.ranks`); where ranks could differ, rank 0's answer counts. `state` is
    called where a checkpoint is written, which may be rank 0 alone.
    """

    #: Name of the method that a user's class must have.
    required: ClassVar[str] = ""
    #: Works on rows one by one: packing and streaming are refused. May depend on the parameters.
    needs_single_rows: bool = True
    #: Takes gradients of single rows, those of LoRA matrices at least.
    needs_lora: bool = False
    #: Why it takes no others, as the end of a sentence; "" where it takes those of whole weights
    #: (finetuning_type full or freeze) as well. May depend on the parameters.
    lora_alone: str = "works on per-sample LoRA gradients"
    #: Needs target rows (`target_dataset`, `eval_dataset` or `val_size`).
    needs_targets: bool = False
    #: Reads the optimizer's Adam moments; may depend on the parameters.
    needs_moments: bool = False
    #: What to set so that no moments are needed.
    without_moments: ClassVar[str] = "component_params.gradient_type to sgd or sign"
    #: Weights the losses of training: options that replace them are refused.
    reads_losses: bool = False
    #: Compares rows by their losses, in passes of its own. May depend on the parameters.
    scores_by_loss: bool = False
    #: Gets the training losses of every step (`observe`).
    observes: bool = False
    #: Ways to spread a model over devices (FSDP, ZERO3) under which this strategy's own passes over
    #: it are impossible: refused.
    whole_model: frozenset[str] = frozenset()
    #: Where the method was published, for `dataflex-cli components`.
    paper: ClassVar[str] = ""
    #: component_params that change no result: a resume may use other values.
    neutral: ClassVar[frozenset[str]] = frozenset()
    #: Settings of its gradient features (`FeatureSettings`), which `gradstore build` follows; None
    #: where it takes no gradients into a store.
    gradient_features: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - of other bases
        """Make the constructor refuse values that its signature does not allow."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked(cls)

    def check(self, config: RunConfig) -> list[str]:
        """Return one sentence per fault in the configuration alone; nothing is loaded yet."""
        return []

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Refuse rows this strategy can't work on (BadInput), before the model is loaded."""

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast this strategy's own passes over rows, for `--dry-run`.

        Called in one process, in the place of `start` and all that follows it; writes nothing. By
        default: the losses that `scores_by_loss` declares, measured; where other attributes
        declare passes, a line that says they were not; else none.

        Args:
            run: with its model and a board of losses.
            steps: rising optimizer steps at which the strategy is asked; at least one.
        """
        from dataflex.run.forecast import Forecast, losses_forecast

        found = [losses_forecast(run, len(steps))] if self.scores_by_loss else []
        declared = self.needs_lora or self.needs_moments or self.needs_targets
        if declared or (self.whole_model and not found):
            note = "the class does not forecast them"
            found.append(Forecast(f"passes of {type(self).__name__}", len(steps), note=note))
        return found

    def start(self, run: RunContext) -> None:
        """Start the strategy, once before the first step; checks that need the model go here."""

    def observe(self, losses: DomainLosses) -> None:
        """Take the training losses of a finished step; only where `observes` is true."""

    def finish(self) -> None:
        """Finish the strategy, once after the last step, also when training fails."""

    def state(self) -> dict[str, Any]:
        """Return JSON values and NumPy arrays that a checkpoint keeps; restored by `restore`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; called before `start`."""


def ask_forecasts(strategy: Strategy, run: RunContext, steps: Sequence[int]) -> list[Forecast]:
    """Ask a strategy, which may be a user's own, to forecast its passes; none without `steps`.

    Raises:
        BadInput: it answers something else.
    """
    from dataflex.run.forecast import Forecast

    answer: Any = strategy.forecasts(run, steps) if steps else ()
    found = list(answer) if isinstance(answer, Iterable) else [answer]
    if odd := [f for f in found if not isinstance(f, Forecast)]:
        raise BadInput(
            f"{target_of(type(strategy))}.forecasts answered a {type(odd[0]).__name__}; expected a "
            "list of dataflex.api.Forecast, one for each pass, or an empty one."
        )
    return found


def adapt(built: object, base: type[S]) -> S:
    """Wrap a user's duck-typed object in a strategy with all methods of `base`.

    The answer is an instance of `base` that has the object in front: what the object has counts,
    `base` provides the rest, also in place of what a subclass of `Strategy` itself leaves as it is.
    It bears the name of the user's class, which checkpoints keep.

    Args:
        built: the object; returned as it is where it is an instance of `base`.
        base: of its kind: Selector, Mixer, Weighter, Reorder or Pipeline.

    Raises:
        BadInput: it lacks the method that answers, or `base` has to be subclassed.

    Examples:
        >>> from dataflex.api import Selector
        >>> class Mine:
        ...     needs_targets = True
        ...     def select(self, count, context):
        ...         return count
        >>> adapted = adapt(Mine(), Selector)
        >>> adapted.select(2, None), adapted.needs_targets, adapted.needs_lora, adapted.state()
        (2, True, False, {})
    """
    _check_answers(built, base)
    if isinstance(built, base):
        return built
    own = type(built)
    named = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    completed: Any = type(own.__name__, (_Wrapper, base), named)
    answer: S = completed(built)
    return answer


class _Wrapper:
    """A user's object, before the base of its kind in the order of look-up.

    `__class__` is the object's, too: `isinstance` knows its bases beside that of its kind, such as
    a mixer's LossContributor.
    """

    def __init__(self, own: object) -> None:
        self._own = own

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - whatever the object has
        own = object.__getattribute__(self, "_own")
        if not _is_default(own, name):
            try:
                return getattr(own, name)
            except AttributeError:
                pass
        return object.__getattribute__(self, name)


def _is_default(own: object, name: str) -> bool:
    """Return whether an object has a public attribute from `Strategy` alone, unchanged.

    The base of a kind has other defaults, and they are the ones meant.
    """
    if name.startswith("_") or name in getattr(own, "__dict__", ()):
        return False
    return next((c for c in type(own).__mro__ if name in vars(c)), None) is Strategy


def _check_answers(built: object, base: type[Strategy]) -> None:
    """Refuse what has no answer of its own to give (BadInput)."""
    own = target_of(type(built))
    if not base.required:
        if not isinstance(built, base):
            raise BadInput(f"{own} is no {base.__name__}: subclass {target_of(base)}.")
        return
    promised, method = getattr(base, base.required), getattr(built, base.required, None)
    if callable(method) and getattr(method, "__func__", method) is not promised:
        return
    arguments = ", ".join([*inspect.signature(promised).parameters][1:])
    raise BadInput(
        f"{own} has no method {base.required}({arguments}), which every {base.__name__} needs: "
        f"define it; `python -m pydoc dataflex.api.{base.__name__}` says what it returns."
    )
