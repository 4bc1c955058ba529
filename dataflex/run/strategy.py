"""What every strategy has in common, whatever it decides: checks, life cycle, state, a paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dataflex.config.parameters import checked

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from dataflex.data.rows import RunData
    from dataflex.run.context import RunContext


#: Ways to spread a model over devices, members of `Strategy.whole_model`.
FSDP, ZERO3 = "FSDP", "DeepSpeed ZeRO-3"


class Strategy:
    """Base of selectors, mixers, weighters, reorders and pipelines.

    The constructor's keyword parameters are the accepted `component_params`, its annotations their
    types and limits, its docstring their documentation. A value that an annotation refuses is
    refused however the strategy is built; the constructor itself checks only how parameters relate
    to each other. Every method but `check` and `state` is called on every rank, so that passes over
    the data are shared (`context.run.ranks`); where ranks could differ, rank 0's answer counts.
    `state` is called where a checkpoint is written, which may be rank 0 alone.
    """

    #: Works on rows one by one: packing and streaming are refused. May depend on the parameters.
    needs_single_rows: bool = True
    #: Takes LoRA gradients.
    needs_lora: bool = False
    #: Needs target rows (`target_dataset`, `eval_dataset` or `val_size`).
    needs_targets: bool = False
    #: Reads the optimizer's Adam moments; may depend on the parameters.
    needs_moments: bool = False
    #: Weights the losses of training: options that replace them are refused.
    reads_losses: bool = False
    #: How a model may be spread over devices (FSDP, ZERO3) that this strategy's own passes over it
    #: cannot be made under: refused.
    whole_model: frozenset[str] = frozenset()
    #: Where the method was published, for `dataflex-cli components`.
    paper: ClassVar[str] = ""
    #: component_params that change no answer: a resume may set them anew.
    neutral: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - of other bases
        """Have the constructor refuse what its signature does not allow."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked(cls)

    def check(self, config: RunConfig) -> list[str]:
        """One sentence per fault that shows in the configuration alone; nothing is loaded yet."""
        return []

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Refuse rows this strategy can't work on (BadInput), before the model is loaded."""

    def start(self, run: RunContext) -> None:
        """Called once before the first step; the place for refusals that need the model."""

    def finish(self) -> None:
        """Called once after the last step, also when training fails."""

    def state(self) -> dict[str, Any]:
        """JSON values and NumPy arrays that a checkpoint keeps; restored by `restore`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; called before `start`."""
