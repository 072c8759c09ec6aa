"""Models: build one from a config, initialise it from a seed, save, load and hash it.

Teachers and students are built here alike; a student is the same kind of model, only smaller.
"""

import hashlib
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.logging import disable_progress_bar

from configs.schema import LabError, Model, nearest
from models.classifier import CLASSIFIERS, build_classifier
from models.rows import Batch

disable_progress_bar()  # one bar per file of a toy model is noise
# Rows are padded on the right and attention is causal: no mask is needed, and no warning.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "recommend passing in an `attention_mask`" not in record.getMessage()
)

# input_ids [B, L] -> an output with .logits; a model, or one that counts its forward passes.
Forward = Callable[..., Any]

TRAIN_AGAIN = "delete that folder and run train.py on the config again"


class ModelTask(Protocol):
    """What a task says about the models that fit it."""

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int
    longest_row: int


def build_model(settings: Model, task: ModelTask) -> nn.Module:
    """A transformers model for this task, not yet initialised from a seed.

    LabError if transformers does not know the architecture or one of the settings.
    """
    if settings.architecture in CLASSIFIERS:
        if task.tokenizer is not None:
            raise LabError(
                f"model.architecture {settings.architecture!r} classifies images, but task "
                f"{task.name} is text; use llama or gpt2"
            )
        return build_classifier(settings, task.longest_row - 1, task.vocabulary)
    if task.tokenizer is None:
        raise LabError(
            f"model.architecture {settings.architecture!r} reads text, but task {task.name} has "
            f"images; use one of {', '.join(CLASSIFIERS)}"
        )
    return build_language_model(settings, task.tokenizer, task.longest_row)


def build_language_model(
    settings: Model, tokenizer: PreTrainedTokenizerBase, positions: int
) -> nn.Module:
    """A causal language model over the vocabulary of a tokenizer."""
    wanted = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "max_position_embeddings": positions,
        "initializer_range": settings.initializer_range,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        **settings.settings,
    }
    try:
        known = AutoConfig.for_model(settings.architecture)
    except ValueError:
        raise LabError(
            f"model.architecture {settings.architecture!r} is not one that transformers has; "
            "llama is the default, gpt2 the fastest on a CPU"
        ) from None
    for setting in settings.settings:
        if not hasattr(known, setting):
            raise LabError(
                f"model.settings.{setting} is no setting of {settings.architecture}"
                f"{nearest(setting, known.to_dict())}"
            )
    if "num_key_value_heads" in known.to_dict():
        wanted.setdefault("num_key_value_heads", settings.num_attention_heads)
    if settings.intermediate_size or "intermediate_size" in known.to_dict():
        # 8/3 of the width: a gated layer of three matrices then costs what an ungated one would
        inner = settings.intermediate_size or -(-settings.hidden_size * 8 // 3 // 8) * 8
        wanted["n_inner" if settings.architecture == "gpt2" else "intermediate_size"] = inner
    # A model of a few layers that sees its data a few times does not need dropout, and without it
    # a training is a function of its seed and the step alone.
    for name, value in known.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            wanted.setdefault(name, 0.0)
    config = AutoConfig.for_model(settings.architecture, **wanted)
    # Rows of tens of tokens: plain matrix products beat the fused attention kernels on a CPU.
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Starting weights from NumPy, a function of (seed, parameter name) alone.

    torch's own initialisers differ between instruction sets; these do not. Matrices are normal
    with the config's initializer_range, biases and norms stay as built (zeros and ones).
    """
    scale = model.config.initializer_range
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                bits = np.random.PCG64([seed, zlib.crc32(name.encode())])
                values = np.random.Generator(bits).standard_normal(parameter.shape) * scale
                parameter.copy_(torch.from_numpy(values))
    return model


def logits_at(output: Any, batch: Batch, vocabulary: int) -> Tensor:
    """The logits [M, V] that predict the M counted positions of a batch. Columns beyond the
    vocabulary pad the matrices of some models; a classifier has one position per row already."""
    logits = output.logits
    if logits.ndim == 3:
        logits = logits[batch.counted.to(logits.device)]
    return logits[:, :vocabulary]


def parameter_count(model: nn.Module) -> int:
    """Tied parameters are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_of(forward: Forward) -> torch.device:
    """Where a model, counted or not, expects its token ids."""
    return getattr(forward, "device", torch.device("cpu"))


# -- saved models ----------------------------------------------------------------------------------


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path, card: str
) -> None:
    """A transformers model folder, moved into place when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def model_card(stage: str, model: nn.Module, lineage: str, steps: int) -> str:
    """What a model is and what it descends from."""
    kind = "text-generation" if hasattr(model, "generate") else "image-classification"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {kind}\n---\n"
        f"# {stage}\n\n{lineage}\n\n"
        f"{model.config.model_type}, {parameter_count(model):,} parameters, {steps} steps, tensors "
        f"sha256 {sha256_of_tensors(model.state_dict())[:16]}. Made by Distillation Lab.\n"
    )


def load_model(folder: Path) -> nn.Module:
    """A saved model in evaluation mode. LabError if the folder is missing or damaged."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise LabError(f"{folder} holds no model.safetensors; {TRAIN_AGAIN}")
    if folder.is_symlink() or file.is_symlink():
        raise LabError(f"{file} is a link out of this run; put the file itself there")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if config.model_type in CLASSIFIERS:
            model = AutoModelForImageClassification.from_pretrained(folder, **options)
        else:
            options |= {"use_safetensors": True, "attn_implementation": "eager"}
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise LabError(
            f"{folder} cannot be loaded ({type(error).__name__}: {reason}); {TRAIN_AGAIN}"
        ) from None
    return model.eval()


def load_pretrained(name: str) -> nn.Module:
    """The weights and shape of a folder or of a model of the hub, which may have to be downloaded.
    No code of it is run, and nothing is unpickled."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            use_safetensors=True,
            attn_implementation="eager",
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except Exception as error:
        raise cannot_load(f"model.pretrained {name!r}", error) from None


def pretrained_layers(name: str) -> int:
    """How many layers a pretrained model has, from its config alone."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False).num_hidden_layers
    except Exception as error:
        raise cannot_load(f"model.pretrained {name!r}", error) from None


def cannot_load(what: str, error: Exception) -> LabError:
    reason = str(error).splitlines()[0]
    return LabError(
        f"{what} cannot be loaded ({type(error).__name__}: {reason}); expected a folder or a hub "
        "id with safetensors"
    )


def load_tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: in a folder of the run (a Path), or of a pretrained one."""
    local = isinstance(place, Path)
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise LabError(
            f"the tokenizer in {place} cannot be loaded ({type(error).__name__}: {reason}); "
            f"{TRAIN_AGAIN if local else 'expected a folder or a hub id with one'}"
        ) from None


def sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    """One hash over names, types, shapes and bytes: the same model has the same hash, whatever
    the bytes of its file (the order of safetensors metadata is not stable)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of_model(folder: Path) -> str:
    """The tensor hash of a saved model. LabError if its file is missing or damaged."""
    file = folder / "model.safetensors"
    try:
        return sha256_of_tensors(load_file(file))
    except FileNotFoundError:
        raise LabError(f"no {file}; run train.py on the config again") from None
    except Exception as error:
        raise LabError(f"{file} is damaged ({error}); {TRAIN_AGAIN}") from None


# -- models made of others -------------------------------------------------------------------------


class Averaged:
    """Several teachers as one, for scoring: the mean of their probabilities over one vocabulary."""

    def __init__(self, models: Sequence[Forward], vocabulary: int) -> None:
        self.models, self.vocabulary = models, vocabulary

    @property
    def device(self) -> torch.device:
        return device_of(self.models[0])

    @property
    def flops(self) -> float:
        return sum(model.flops for model in self.models)

    def __call__(self, input_ids: Tensor, **options: Any) -> CausalLMOutput:
        each = [
            model(input_ids, **options).logits[..., : self.vocabulary].log_softmax(-1)
            for model in self.models
        ]
        return CausalLMOutput(logits=torch.stack(each).logsumexp(0) - math.log(len(each)))


def take_layers(student: nn.Module, teacher: nn.Module, layers: Sequence[int]) -> nn.Module:
    """Start a student from some of the teacher's layers, counted from 1, and from its embeddings
    and norms: Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, section 2."""
    of_teacher, of_student = dict(teacher.named_parameters()), dict(student.named_parameters())
    numbered = re.compile(r"\.(layers|h)\.(\d+)\.")
    if len({numbered.search(n)[2] for n in of_student if numbered.search(n)}) != len(layers):
        raise LabError(
            f"student.initial_layers {list(layers)}: the layers of {student.config.model_type} "
            "cannot be recognised by name; remove it"
        )
    with torch.no_grad():
        for name, parameter in of_student.items():
            source = numbered.sub(lambda at: f".{at[1]}.{layers[int(at[2])] - 1}.", name)
            parameter.copy_(of_teacher[source])
    return student
