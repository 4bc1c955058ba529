"""Packages that some keys need and an installation may lack: told before anything is imported."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dataflex.config.known import KnownKeys
from dataflex.config.registry import unknown
from gradstore.errors import BadInput

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """A package that pip installs and Python imports.

    Attributes:
        modules: names under which it can be imported, any of which will do.
        requirement: what pip installs.
    """

    modules: tuple[str, ...]
    requirement: str

    @property
    def there(self) -> bool:
        """A flag: it can be imported (it is not)."""
        return any(importlib.util.find_spec(name) is not None for name in self.modules)

    @property
    def command(self) -> str:
        """The command that installs it."""
        quoted = "'" if set(self.requirement) & set("[<>= ") else ""
        return f"pip install {quoted}{self.requirement}{quoted}"


def _package(module: str, requirement: str | None = None) -> Package:
    return Package((module,), requirement or module.replace("_", "-"))


def _extra(name: str, *modules: str) -> Package:
    return Package(modules or (name,), f"dataflex-gradstore[{name}]")


#: Values of `report_to` and what each needs: transformers' integrations.
REPORTERS: Mapping[str, Package] = {
    "azure_ml": _package("azureml", "azureml-core"),
    "clearml": _package("clearml"),
    "codecarbon": _package("codecarbon"),
    "comet_ml": _package("comet_ml"),
    "dagshub": _package("dagshub"),
    "dvclive": _package("dvclive"),
    "flyte": _package("flytekit"),
    "kubeflow": _package("kubeflow"),
    "mlflow": _extra("mlflow"),
    "neptune": _package("neptune"),
    "swanlab": _extra("swanlab"),
    "tensorboard": _extra("tensorboard", "tensorboard", "tensorboardX"),
    "trackio": _package("trackio"),
    "wandb": _extra("wandb"),
}

_BITSANDBYTES = _package("bitsandbytes")
_GALORE, _APOLLO = _package("galore_torch"), _package("apollo_torch")

#: Keys that need a package when they are on.
SWITCHES: Mapping[str, Package] = {
    "deepspeed": _package("deepspeed"),
    "enable_liger_kernel": _package("liger_kernel"),
    "mixture_of_depths": _package("MoD", "mixture-of-depth>=1.1.6"),
    "use_adam_mini": _package("adam_mini"),
    "use_apollo": _APOLLO,
    "use_badam": _package("badam", "badam>=1.2.1"),
    "use_galore": _GALORE,
    "use_kt": _package("kt_kernel"),
    "use_swanlab": REPORTERS["swanlab"],
    "use_unsloth": _package("unsloth"),
}

#: quantization_method -> what quantization_bit needs.
QUANTIZERS: Mapping[str, Package] = {
    "bnb": _BITSANDBYTES,
    "eetq": _package("eetq"),
    "hqq": _package("hqq"),
}

#: Values of `optim` that need a package, by a test of their name.
OPTIMIZERS: tuple[tuple[Callable[[str], bool], Package], ...] = (
    (lambda name: name.startswith("galore"), _GALORE),
    (lambda name: name.startswith("apollo"), _APOLLO),
    (lambda name: name.endswith("lomo"), _package("lomo_optim")),
    (lambda name: name.startswith("schedule_free"), _package("schedulefree")),
    (lambda name: name in ("adamw_torch_4bit", "adamw_torch_8bit"), _package("torchao")),
    (lambda name: name == "grokadamw", _package("grokadamw")),
    (lambda name: name == "stable_adamw", _package("optimi", "torch-optimi")),
    (lambda name: name == "adamw_apex_fused", _package("apex")),
    (lambda name: name == "adamw_anyprecision", _package("torchdistx")),
    (lambda name: name.startswith(("paged_", "rmsprop_bnb", "lion", "adamw_bnb", "ademamix",
                                   "adamw_8bit")), _BITSANDBYTES),
)  # fmt: skip

#: What generated answers are measured with.
_MEASURES = (_package("jieba"), _package("nltk"), _package("rouge_chinese"))


def check_packages(keys: Mapping[str, Any]) -> None:
    """Check that what LlamaFactory's keys need can be imported.

    Args:
        keys: LlamaFactory's, as the user wrote them.

    Raises:
        BadInput: a package is missing; one sentence a key, with the command that installs it.
    """
    faults = [
        f"{key} is {keys[key]!r}, which needs a package that is not installed: {package.command}"
        for key, package in _needed(keys)
        if not package.there
    ]
    if faults:
        raise BadInput("\n".join(dict.fromkeys(faults)))
    flash = _package("flash_attn")
    if KnownKeys.of(keys).flash_attn == "fa2" and not flash.there:
        _log.warning("flash_attn is fa2, but its package is not installed (%s): LlamaFactory "
                     "trains without it", flash.command)  # fmt: skip


def check_reporters(keys: Mapping[str, Any]) -> None:
    """Check that `report_to` names trackers that exist and can be imported.

    Raises:
        BadInput: it does not.
    """
    given = KnownKeys.of(keys).report_to  # several are a list: LlamaFactory splits no comma string
    listed = given if isinstance(given, list) else [given]
    named = [name for name in listed if name not in ("none", "all", None)]
    if extra := {str(name) for name in named} - set(REPORTERS):
        several = [n.strip() for text in extra for n in text.split(",") if "," in text]
        step = f" Several are a list: report_to: [{', '.join(several)}]." if several else ""
        raise BadInput(unknown("report_to", extra, (*REPORTERS, "all", "none")) + step)
    faults = [
        f"report_to is {name}, which needs a package that is not installed: "
        f"{REPORTERS[name].command}. Or set report_to: none."
        for name in named
        if not REPORTERS[name].there
    ]
    if faults:
        raise BadInput("\n".join(faults))


def _needed(keys: Mapping[str, Any]) -> Iterator[tuple[str, Package]]:
    """Yield the keys that need a package, with it."""
    yield from ((key, package) for key, package in SWITCHES.items() if keys.get(key))
    known = KnownKeys.of(keys)
    quantizer = QUANTIZERS.get(known.quantization_method)
    if known.quantization_bit is not None and quantizer is not None:
        yield "quantization_bit", quantizer
    for means, package in OPTIMIZERS:
        if means(known.optim):
            yield "optim", package
            break
    if known.predict_with_generate:
        yield from (("predict_with_generate", package) for package in _MEASURES)
