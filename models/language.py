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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.logging import disable_progress_bar

from configs.files import flush_to_disk, sha256_of_file
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

WEIGHTS = "model.safetensors"
LARGE_VOCABULARY = 8192  # outcomes, from which on logits are computed in chunks
# Tokenizers that are read from tokenizer.json alone, whatever the architecture beside them.
PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
TRAIN_AGAIN = "move that folder elsewhere and run train.py on the config again"


class ModelTask(Protocol):
    """What building a model needs to know of its task."""

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int
    longest_row: int
    pad: int


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
            f"model.architecture {settings.architecture!r} is unknown to transformers; "
            "llama is the default, gpt2 the fastest on a CPU"
        ) from None
    for setting in settings.settings:
        if not hasattr(known, setting):
            raise LabError(
                f"model.settings.{setting} is not a setting of {settings.architecture}"
                f"{nearest(setting, known.to_dict())}"
            )
    defaults = known.to_dict()
    wanted = {**derived_sizes(settings, defaults), **wanted}
    # Small models trained for a few epochs need no dropout, and without it training depends only on
    # the seed and the step.
    for name, value in defaults.items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            wanted.setdefault(name, 0.0)
    if "is_decoder" in defaults:
        wanted.setdefault("is_decoder", True)  # otherwise some architectures are not causal
    try:
        config = AutoConfig.for_model(settings.architecture, **wanted)
        # For rows of tens of tokens, plain matrix products beat fused attention kernels on a CPU;
        # the FLOPs of experts are counted only if they are computed one by one.
        config._experts_implementation = "eager"
        require_memory(config)
        return AutoModelForCausalLM.from_config(config, attn_implementation=settings.attention)
    except LabError:
        raise
    except Exception as error:  # every architecture has its own rules
        raise LabError(
            f"model.architecture {settings.architecture!r} cannot be built with these sizes "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); change model.settings"
        ) from None


def require_memory(config: Any) -> None:
    """LabError for a model that this machine cannot train: with its gradients and both moments of
    AdamW it takes four times its weights."""
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = max(getattr(config, name, 0) or 0 for name in INNER)
    parameters = config.vocab_size * width + layers * width * (2 * width + 2 * inner)
    needed, present = 16 * parameters, psutil.virtual_memory().total
    if needed > present:
        raise LabError(
            f"model: at least {parameters / 1e9:.0f} billion parameters need {needed / 2**30:,.0f} "
            f"GiB to train, this machine has {present / 2**30:.0f}; choose smaller sizes"
        )


# What architectures call the width of the MLP, and other sizes that follow from those of `Model`.
INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_inner")


def derived_sizes(settings: Model, defaults: dict[str, Any]) -> dict[str, int]:
    """The sizes that a config names besides width, layers and heads. LabError if intermediate_size
    is set and the architecture has no such size."""
    width, heads = settings.hidden_size, settings.num_attention_heads
    inner = next((name for name in INNER if name in defaults), None)
    if settings.intermediate_size and inner is None:
        raise LabError(
            f"model.intermediate_size: {settings.architecture} has no such size; remove it, or set "
            "what it reads in model.settings"
        )
    # 8/3 of the width: a gated MLP of three matrices then costs as much as an ungated one
    inner_width = settings.intermediate_size or -(-width * 8 // 3 // 8) * 8
    sizes = {"word_embed_proj_dim": width, "moe_intermediate_size": inner_width}
    sizes |= dict.fromkeys(("head_dim", "rotary_dim"), width // heads)
    sizes = {name: size for name, size in sizes.items() if defaults.get(name) is not None}
    if "num_key_value_heads" in defaults:
        sizes["num_key_value_heads"] = heads
    if inner and (settings.intermediate_size or defaults[inner] is not None):
        sizes[inner] = inner_width
    return sizes


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Initial weights drawn by NumPy, a function of (seed, parameter name) only.

    torch's own initialisers differ between instruction sets; these do not. Parameters that differ
    between two builds are random: they become normal with the config's initializer_range. The
    others stay as built: biases, norms, the decay rates of a recurrent model.
    """
    scale = model.config.initializer_range
    again = dict(type(model)(model.config).to(model.dtype).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not torch.equal(parameter, again[name]):
                bits = np.random.PCG64([seed, zlib.crc32(name.encode())])
                values = np.random.Generator(bits).standard_normal(parameter.shape) * scale
                parameter.copy_(torch.from_numpy(values))
    return model


def logits_at(output: Any, batch: Batch, vocabulary: int) -> Tensor:
    """The logits [M, V] at the M counted positions of a batch, in float32 or more. Columns beyond
    the vocabulary only pad the matrices of some models; a classifier already has one position per
    row."""
    logits = output.logits
    if logits.ndim == 3:
        logits = logits[batch.counted.to(logits.device)]
    return precise(logits[:, :vocabulary])


def precise(values: Tensor) -> Tensor:
    """Half precision is for matrix products: what is summed or compared has float32 or more."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Matrix products in another type than the weights; None: in theirs."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@dataclass(frozen=True)
class LinearHead:
    """logits = scale * (states W^T + b): weight [V, H], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    scale: float

    def logits(self, states: Tensor) -> Tensor:
        return self.scale * nn.functional.linear(states, self.weight, self.bias)


def linear_head(model: nn.Module) -> LinearHead | None:
    """How a language model computes logits [.., V] from its last hidden states [.., H]; None for
    classifiers and for models with logit soft-capping, which is not linear."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(model.config, "final_logit_softcapping", None):
        return None
    # granite divides its logits by a constant, cohere multiplies them
    config = model.config
    times, by = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
    return LinearHead(head.weight, head.bias, times / by)


def parameter_count(model: nn.Module) -> int:
    """Tied parameters are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def device_of(forward: Forward) -> torch.device:
    """The device on which a model, counted or not, expects its token ids."""
    return getattr(forward, "device", torch.device("cpu"))


def charged(forward: Forward, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), its FLOPs charged to a model if that is counted."""
    charge = getattr(forward, "charge", None)
    return charge(function, *arguments) if charge else function(*arguments)


# -- saved models ----------------------------------------------------------------------------------


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, folder: Path, card: str
) -> None:
    """Write a transformers model folder; it is moved into place when complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    attention = getattr(model.config, "_attn_implementation", "eager")
    if attention != "eager":
        model.config.lab_attention = attention  # transformers does not save it
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    for file in partial.iterdir():
        flush_to_disk(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def model_card(stage: str, model: nn.Module, lineage: str, steps: int, usage: str = "") -> str:
    """The model card: what a model is, what it was trained from, and how to ask it."""
    kind = "text-generation" if hasattr(model, "generate") else "image-classification"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {kind}\n---\n"
        f"# {stage}\n\n{lineage}\n\n"
        f"{model.config.model_type}, {parameter_count(model):,} parameters, {steps} steps, tensors "
        f"sha256 {sha256_of_tensors(model.state_dict())[:16]}. Made by Distillation Lab.\n"
        f"{usage}"
    )


def load_model(folder: Path) -> nn.Module:
    """A saved model in evaluation mode. LabError if the folder is missing or damaged, or if its
    weights do not match its config."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise LabError(f"{folder} holds no model.safetensors; {TRAIN_AGAIN}")
    if folder.is_symlink() or file.is_symlink():
        raise LabError(f"{file} is a symlink out of this run; put the file itself there")
    options = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type in CLASSIFIERS:
            model, report = AutoModelForImageClassification.from_pretrained(folder, **options)
        else:
            attention = getattr(config, "lab_attention", "eager")
            options |= {"use_safetensors": True, "attn_implementation": attention}
            model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        raise cannot_read(folder, error) from None
    require_all_weights(report, f"{folder}", TRAIN_AGAIN)
    if end_marks(model):
        use_one_end_mark(model, load_tokenizer(folder).eos_token_id)
    return unmapped(model).eval()


def unmapped(model: nn.Module) -> nn.Module:
    """A loaded model with tensors of its own. Views of the file would change with it, and Windows
    can neither replace nor remove a file that is mapped."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model


def cannot_read(place: Path, error: Exception) -> LabError:
    """What to do about a model that cannot be read. Too little memory is no damage."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "allocat" in reason or "memory" in reason.lower():
        return LabError(
            f"{place} cannot be read for lack of memory ({reason[:200]}); it need not be damaged: "
            "free some memory and run the same command again"
        )
    return LabError(
        f"{place} cannot be read ({type(error).__name__}: {reason[:200]}); {TRAIN_AGAIN}"
    )


def end_marks(model: nn.Module) -> list[int]:
    """The tokens that end an answer, according to a model's generation config."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def use_one_end_mark(model: nn.Module, end: int) -> None:
    """Let a model with several end marks, or with another one than its tokenizer, use a single one,
    with the probability of all of them: then it stops, and is scored and imitated, like others."""
    others = [token for token in end_marks(model) if token != end]
    if not others:
        return

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        logits = precise(output.logits).clone()
        logits[..., end] = logits[..., [end, *others]].logsumexp(-1)
        logits[..., others] = -torch.inf
        output.logits = logits
        return output

    model.register_forward_hook(hook)


def use_special_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer's special tokens into a model's configs, with greedy decoding: the start of
    a student may have had others."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names}
    model.generation_config = GenerationConfig(**tokens, do_sample=False)
    for name, token in tokens.items():
        setattr(model.config, name, token)


def require_all_weights(report: dict[str, Any], what: str, advice: str) -> None:
    """LabError if a model was loaded with weights that are missing (so random), unexpected (so
    dropped) or of another shape, according to transformers' loading report."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(map(str, report.get(kind) or ()))
        if found:
            raise LabError(
                f"{what} has {len(found)} {kind.replace('_', ' ')} for its config, such as "
                f"{found[0]}: part of the model would be random; {advice}"
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model of this run."""
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        # For some architectures AutoTokenizer ignores which kind of tokenizer was saved.
        saved = get_tokenizer_config(folder, **options).get("tokenizer_class")
        kind = PreTrainedTokenizerFast if saved in PLAIN_TOKENIZERS else AutoTokenizer
        return kind.from_pretrained(folder, **options)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise LabError(
            f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {reason}); "
            f"{TRAIN_AGAIN}"
        ) from None


def sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    """One hash over names, types, shapes and bytes. It does not depend on the file's bytes: the
    order of safetensors metadata is not stable."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of_model(folder: Path) -> str:
    """The tensor hash of a saved model. LabError if its file is missing or damaged."""
    file = folder / WEIGHTS
    try:
        return sha256_of_tensors(load_file(file))
    except FileNotFoundError:
        raise LabError(f"no {file}; run train.py on the config again") from None
    except Exception as error:
        raise cannot_read(file, error) from None


def sha256_of_files(folder: Path) -> dict[str, str]:
    """{name: sha256} of the files of a saved model besides weights and model card: config,
    generation config, tokenizer."""
    files = (file for file in folder.iterdir() if file.is_file())
    excluded = {WEIGHTS, "README.md"}
    return {file.name: sha256_of_file(file) for file in sorted(files) if file.name not in excluded}


# -- models made from other models -----------------------------------------------------------------


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
            precise(model(input_ids, **options).logits[..., : self.vocabulary]).log_softmax(-1)
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
