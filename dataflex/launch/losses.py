"""LlamaFactory's options of the loss, and what each reader of losses does about them.

Strategies compare rows by one quantity, the plain cross-entropy of their target tokens, so that
scores of one run, or of one store, mean the same. An option by which training minimises another
loss is refused where a reader needs that very loss, and told in one line elsewhere
(docs/losses.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from dataflex.config.known import KnownKeys
from dataflex.run.strategy import Strategy


class Reader(StrEnum):
    """Ways in which a strategy reads losses; docs/losses.md lists which reads which."""

    GRADIENTS = "gradients"  # of a row's loss
    ROW_LOSSES = "losses of rows"  # in passes of its own
    OBSERVED = "observed losses"  # of the training passes
    REPLAY = "replayed losses"  # differentiates what training minimised
    WEIGHTS = "weights"  # multiplies each sample's part of the loss


@dataclass(frozen=True)
class LossOption:
    """One option of LlamaFactory.

    Attributes:
        key: its name.
        does: what it does to the loss, as the end of "..., which".
        refused_by: readers that cannot work with it.
        told: whether other readers compare by another loss than training minimises.
        stage: the only stage in which it acts; "" for any.
        acts_when: the value with which it acts.
        off: the value with which it does not, as YAML.
    """

    key: str
    does: str
    refused_by: frozenset[Reader] = frozenset()
    told: bool = True
    stage: str = ""
    acts_when: bool = True
    off: str = "false"

    def is_on(self, known: KnownKeys) -> bool:
        """Return whether the option acts in a run with these keys."""
        acts = bool(getattr(known, self.key)) is self.acts_when
        return acts and self.stage in ("", known.stage)


_IN_REPLAY = frozenset({Reader.REPLAY})
_IN_TRAINING = frozenset({Reader.OBSERVED, Reader.WEIGHTS}) | _IN_REPLAY

OPTIONS = (
    *(
        LossOption(key, "replaces the loss", _IN_TRAINING, stage="sft")
        for key in ("use_dft_loss", "use_asft_loss", "use_eaft_loss")
    ),
    LossOption(
        "ignore_pad_token_for_loss",
        "adds padding, as much as its batch has, to the loss",
        _IN_TRAINING,
        stage="sft",
        acts_when=False,
        off="true",
    ),
    LossOption("label_smoothing_factor", "smooths the labels", _IN_REPLAY, off="0"),
    LossOption("moe_aux_loss_coef", "adds a loss that balances experts", _IN_REPLAY, off="0"),
    LossOption("use_unsloth", "hides the logits", _IN_TRAINING, told=False),
    # Liger's fused loss hides them where the model gets labels; to weight samples, it gets none.
    LossOption(
        "enable_liger_kernel", "hides the logits", _IN_REPLAY | {Reader.OBSERVED}, told=False
    ),
)


def readers_of(strategy: Strategy) -> frozenset[Reader]:
    """List the ways in which a strategy reads losses."""
    reads = {
        Reader.GRADIENTS: strategy.needs_lora,
        Reader.ROW_LOSSES: strategy.scores_by_loss,
        Reader.OBSERVED: strategy.observes,
        Reader.WEIGHTS: strategy.reads_losses,
    }
    return frozenset(reader for reader, on in reads.items() if on)


def loss_faults(known: KnownKeys, who: str, readers: Iterable[Reader]) -> list[str]:
    """List options that replace the loss that a reader needs, or hide the logits it is made of."""
    return [
        f"{option.key} is {'on' if option.acts_when else 'false'}, which {option.does} that {who} "
        f"works with: set {option.key}: {option.off}."
        for option in OPTIONS
        if option.is_on(known) and option.refused_by & set(readers)
    ]


def loss_difference(known: KnownKeys, who: str, readers: Iterable[Reader]) -> str:
    """Say in one line that training minimises another loss than `who` compares rows by.

    Returns:
        "" where the two are the same, or `who` reads no loss.
    """
    on = [o for o in OPTIONS if o.told and o.is_on(known)]
    if not on or not list(readers):
        return ""
    does, off = [f"{o.key} {o.does}" for o in on], [f"{o.key}: {o.off}" for o in on]
    return (
        f"training and scoring use different losses: {' and '.join(does)} in training, {who} "
        "compares rows by the plain cross-entropy of their target tokens. To train on that too, "
        f"set {' and '.join(off)}"
    )
