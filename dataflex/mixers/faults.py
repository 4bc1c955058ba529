"""Faults of a configuration that mixes domains, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex.config.keys import RunConfig
from dataflex.data.mixture import FIXED_RULES, HELD_OUT, RULES, as_proportions, domain_of
from dataflex.mixers.base import Mixer
from gradstore.errors import BadInput


def domain_faults(config: RunConfig) -> list[str]:
    """List the reasons, known from the configuration alone, that domains cannot be mixed."""
    ours, domains = config.dataflex, config.known.dataset
    if not domains:
        return [
            f"dataset is missing: train_type {ours.train_type} mixes the data sets it names. "
            "Name at least one."
        ]
    faults = []
    if len(set(domains)) < len(domains):
        faults.append(f"dataset names a data set twice: {', '.join(domains)}. Name each once.")
    if (strategy := config.known.mix_strategy) != "concat":
        faults.append(
            f"mix_strategy is {strategy!r}, but train_type {ours.train_type} mixes the data sets "
            "itself: remove it, and set the opening mixture in init_mixture_proportions."
        )
    if ours.mixture_sample_rule not in RULES:
        faults.append(
            f"mixture_sample_rule is {ours.mixture_sample_rule!r}; use one of {', '.join(RULES)}."
        )
    if ours.init_mixture_proportions is not None:
        try:
            as_proportions(ours.init_mixture_proportions, domains, "init_mixture_proportions")
        except BadInput as error:
            faults.append(str(error))
    return [*faults, *_held_out_faults(config, domains)]


def _held_out_faults(config: RunConfig, domains: Sequence[str]) -> list[str]:
    sets = config.dataflex.mixer_eval_dataset
    faults = [
        f"mixer_eval_dataset {name!r} belongs to no data set of `dataset`: its name must be one of "
        f"{', '.join(domains)}, with or without {HELD_OUT!r}."
        for name in sets
        if domain_of(name, domains) is None
    ]
    owners = [domain_of(name, domains) for name in sets]
    if len(set(owners)) < len(owners):
        faults.append(
            f"mixer_eval_dataset names two sets for one domain: {', '.join(sets)}. Leave one out."
        )
    if sets and config.known.val_size > 0:
        faults.append(
            "mixer_eval_dataset and val_size both define the held-out rows of the domains: "
            "remove one."
        )
    return faults


def rule_faults(config: RunConfig, mixer: Mixer) -> list[str]:
    """Report a fixed rule that would silently discard a mixer's proportions."""
    rule = config.dataflex.mixture_sample_rule
    if rule not in FIXED_RULES or not mixer.dynamic:
        return []
    return [
        f"mixture_sample_rule is {rule!r}, which fixes the mixture, but component "
        f"{config.dataflex.component_name!r} changes it: set mixture_sample_rule: mixture, or "
        "component_name: static."
    ]
