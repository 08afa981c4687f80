"""Any causal or masked language model of ``transformers``, by the name of a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from recipes.models.causal_lm import CausalLM
from recipes.models.language_model import LanguageModel, Objective
from recipes.models.masked_lm import MaskedLM

HEADS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES}


def hf_model(
    *,
    name: str,
    pretrained: bool,
    objective: Objective | Literal["auto"],
    causal: dict[str, Any],
    **options: Any,
) -> LanguageModel:
    """The LightningModule for the model of that ``name``.

    Args:
        name: A folder that ``save_pretrained`` or ``python -m lightning_mics export`` has made, or a name on the hub.
        pretrained: Start from its weights; else only its shape is taken.
        objective: Objective of training; ``"auto"`` is the objective of its architecture.
        causal: Arguments that only :class:`~recipes.models.causal_lm.CausalLM` has.
        **options: Further arguments of :class:`~recipes.models.language_model.LanguageModel`.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a name, or the folder has no ``config.json``.
        ValueError: If ``transformers`` does not know the architecture, or has no head for ``objective``.
    """
    config = _read_config(name)
    objective = _own_objective(name, config) if objective == "auto" else objective
    if objective not in HEADS:
        raise ValueError(f"model.objective={objective!r} is not one of 'auto', {', '.join(map(repr, HEADS))}")
    if config.model_type not in HEADS[objective]:
        raise ValueError(f"model.name={name}: transformers has no {objective} language model of {config.model_type!r}")
    options |= {"network": config, "pretrained": str(Path(name).expanduser()) if pretrained else None}
    return CausalLM(**options, **causal) if objective == "causal" else MaskedLM(**options)


def _read_config(name: str) -> PretrainedConfig:
    folder = Path(name).expanduser()
    is_path = folder.exists() or name.startswith((".", "/", "~"))
    if is_path and not (folder / "config.json").is_file():
        problem = "has no config.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"model.name={name} {problem}; give a folder of transformers or a name on the hub")
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)  # or it may ask on the terminal
    except OSError as error:
        raise FileNotFoundError(
            f"model.name={name} is neither a folder here nor a name on the hub that can be reached: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"model.name={name} is of no architecture that transformers brings: {error}") from error


def _own_objective(name: str, config: PretrainedConfig) -> Objective:
    """What its architecture was made for, or can be."""
    for architecture in config.architectures or ():
        for objective, heads in HEADS.items():
            if architecture == heads.get(config.model_type):
                return objective
    possible = [objective for objective, heads in HEADS.items() if config.model_type in heads]
    if len(possible) == 1:
        return possible[0]
    raise ValueError(
        f"model.name={name} ({config.model_type!r}, architectures {config.architectures}) does not say which language "
        f"model it is; add model.objective={' or model.objective='.join(possible or HEADS)}"
    )
