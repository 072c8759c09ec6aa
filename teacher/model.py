"""Language models: build one from a config, start it from a seed, load and save it, let it write.

The student is built here as well: it is the same kind of thing, only smaller.
"""

import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils.logging import disable_progress_bar

from configs.schema import LabError, Model, nearest
from tasks.rows import Rows
from teacher.signal import shows_states, states_of

disable_progress_bar()  # a bar per file of a toy model is noise
# Rows are padded on the right and attention looks to the left: they need no mask, and no warning.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "recommend passing in an `attention_mask`" not in record.getMessage()
)

# What a language model is to us: token ids [B, L] -> logits [B, L, V]; it may be a counted one.
Forward = Callable[..., nn.Module]


def build_model(config: Model, tokenizer: PreTrainedTokenizerFast, positions: int) -> nn.Module:
    """A transformers causal language model with this tokenizer's vocabulary, uninitialised seed.

    LabError where transformers does not know the architecture or one of the settings.
    """
    wanted = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": positions,
        "initializer_range": config.initializer_range,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        **config.settings,
    }
    try:
        known = AutoConfig.for_model(config.architecture)
    except ValueError:
        raise LabError(
            f"model.architecture {config.architecture!r} is not one that transformers has; "
            "llama is the default, gpt2 the fastest on a CPU"
        ) from None
    for setting in config.settings:
        if not hasattr(known, setting):
            raise LabError(
                f"model.settings.{setting} is no setting of {config.architecture}"
                f"{nearest(setting, known.to_dict())}"
            )
    if "num_key_value_heads" in known.to_dict():
        wanted.setdefault("num_key_value_heads", config.num_attention_heads)
    if config.intermediate_size or "intermediate_size" in known.to_dict():
        # 8/3 of the width: a gated layer of three matrices then costs what an ungated one would
        inner = config.intermediate_size or -(-config.hidden_size * 8 // 3 // 8) * 8
        wanted["n_inner" if config.architecture == "gpt2" else "intermediate_size"] = inner
    # A model of a few layers that sees its data a few times has no use for dropout, and without it
    # a training is a function of its seed and the step alone.
    for name, value in known.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            wanted.setdefault(name, 0.0)
    shaped = AutoConfig.for_model(config.architecture, **wanted)
    # Rows of tens of tokens: plain matrix products beat the fused attention kernels on a CPU.
    return AutoModelForCausalLM.from_config(shaped, attn_implementation="eager")


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
                drawn = np.random.Generator(bits).standard_normal(parameter.shape) * scale
                parameter.copy_(torch.from_numpy(drawn))
    return model


def size_of(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str
) -> None:
    """A transformers model folder, moved into place whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_model(folder: Path) -> nn.Module:
    """A saved model, ready to be asked. LabError if the folder is missing or damaged."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise LabError(
            f"{folder} holds no model.safetensors; delete that folder and run train.py on the "
            "config again"
        )
    if folder.is_symlink() or file.is_symlink():
        raise LabError(f"{file} is a link out of this run; put the file itself there")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            trust_remote_code=False,
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise LabError(
            f"{folder} cannot be loaded ({type(error).__name__}: {reason}); "
            "delete that folder and run train.py on the config again"
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
        reason = str(error).splitlines()[0]
        raise LabError(
            f"model.pretrained {name!r} cannot be loaded ({type(error).__name__}: {reason}); "
            "expected a folder or a hub id with safetensors"
        ) from None


def load_tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer that a model was saved with: of a folder of the run, or of a pretrained one."""
    local = isinstance(place, Path)
    todo = "delete that folder and run train.py on the config again"
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise LabError(
            f"the tokenizer in {place} cannot be loaded ({type(error).__name__}: {reason}); "
            f"{todo if local else 'expected a folder or a hub id with one'}"
        ) from None


def device_of(forward: Forward) -> torch.device:
    """Where a model, counted or not, wants its token ids."""
    return getattr(forward, "device", torch.device("cpu"))


class Averaged:
    """Several teachers as one, for reading, not for writing: the mean of their probabilities over
    one vocabulary."""

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
    """A student that starts from some of the teacher's layers, counted from 1, and from all that
    is no layer: Sanh et al. 2019 (DistilBERT), arXiv 1910.01108, section 2."""
    theirs, own = dict(teacher.named_parameters()), dict(student.named_parameters())
    numbered = re.compile(r"\.(layers|h)\.(\d+)\.")
    if len({numbered.search(name)[2] for name in own if numbered.search(name)}) != len(layers):
        raise LabError(
            f"initial_layers {list(layers)}: the layers of {student.config.model_type} cannot be "
            "told by their names; leave it away"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            source = numbered.sub(lambda at: f".{at[1]}.{layers[int(at[2])] - 1}.", name)
            parameter.copy_(theirs[source])
    return student


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt: its n new tokens, end mark included, and how likely it
    held them (nats at temperature 1, whatever the sampling temperature). If asked for, also all its
    log-probabilities [n, V] there, its states [P + n - 1, layers, W] after some layers, from the
    first token of the prompt to the last but one of the row, and where it looked from there,
    attention [P + n - 1, layers, P + n - 1] (see `states_of`)."""

    tokens: Tensor
    log_prob: float
    log_probs: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None


KEPT = 2**28  # numbers, 1 GB


def rows_at_once(most: int, tokens: int, vocabulary: int) -> int:
    """How many rows of so many tokens may have all their logits at a time."""
    return min(most, max(1, KEPT // (tokens * vocabulary)))


def answers_of(
    forward: Forward, rows: Rows, batch_rows: int = 512, **options: Any
) -> Iterator[tuple[int, Written]]:
    """Let a model answer the prompts of all rows, in batches of nearly one prompt length, which are
    smaller where a row needs much memory; the options are those of `generate`. Yields (place of the
    row, what was written)."""
    # Logits of one token and what is made of them, or of all tokens.
    tokens = options["longest"] if options.get("keep_log_probs") else 16
    batch_rows = rows_at_once(batch_rows, tokens, options.get("vocabulary") or 1)
    order = np.argsort(rows.prompt_lengths, kind="stable")
    for places in np.array_split(order, -(-len(order) // batch_rows)):
        written = generate(forward, [rows.prompt(i) for i in places], **options)
        yield from zip(places.tolist(), written, strict=True)


@torch.no_grad()
def generate(
    forward: Forward,
    prompts: Sequence[np.ndarray | Tensor],
    *,
    longest: int,
    end: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    separator: int | None = None,
    spelling_temperature: float = 1.0,
    keep_log_probs: bool = False,
    keep_layers: Sequence[int] = (),
    keep_relations: bool = False,
    vocabulary: int | None = None,
    budget: int | None = None,
    closing: int | None = None,
) -> list[Written]:
    """Let a model write: B prompts of any lengths to B continuations up to `end`.

    All rows go on together, token by token: those of longer prompts still read when others already
    write. So nothing is padded, and no mask is needed.

    Temperature 0 takes the likeliest token. No top-p, top-k or repetition penalty hides here.
    With a `separator`, tokens up to it are sampled at `spelling_temperature` (a model that
    invents its own prompts), those after it at `temperature`. `keep_layers` counts from 1. Ids
    from `vocabulary` on, which pad the matrices of some models, are never written. With a `budget`
    a model that has not written the `closing` token after so many tokens of thinking is made to:
    it must answer from what it has (Muennighoff et al. 2025 (s1), arXiv 2501.19393, section 3).
    """
    starts = torch.tensor([len(prompt) for prompt in prompts])
    ends = starts + longest
    rows, width = len(prompts), int(ends.max())
    filled = np.zeros((rows, width), np.int64)
    for row, prompt in zip(filled, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens = torch.from_numpy(filled)
    alive = torch.arange(rows)
    answering = torch.full((rows,), separator is None)
    thinking = torch.full((rows,), budget is not None)
    likely = torch.zeros(rows, dtype=torch.float64)
    log_probs: Tensor | None = None
    hidden: Tensor | None = None
    attention: Tensor | None = None
    cache, device = DynamicCache(), device_of(forward)
    options = {"use_cache": True} | shows_states(keep_layers, keep_relations)
    read = 0
    for place in range(int(starts.min()), width):
        inputs = tokens[alive, read:place].to(device)
        # of a whole prompt the logits would be large, and the last ones are all that is needed
        output = forward(inputs, past_key_values=cache, logits_to_keep=1, **options)
        logits = output.logits[:, -1, :vocabulary].cpu()
        if keep_layers:
            told = states_of(output, keep_layers, keep_relations)
            states, looks = (shown.cpu() for shown in told)
            if hidden is None:
                hidden = states.new_empty((rows, width - 1, *states.shape[2:]))
                attention = states.new_zeros((rows, width - 1, looks.shape[2], width - 1))
            hidden[alive, read:place] = states
            attention[alive, read:place, :, :place] = looks
        written = place - starts[alive]  # so many tokens
        writes = written >= 0
        own = torch.log_softmax(logits[writes], dim=-1)
        if keep_log_probs:
            if log_probs is None:
                log_probs = logits.new_empty((rows, longest, logits.shape[-1]))
            log_probs[alive[writes], written[writes]] = own
        chosen = logits.argmax(-1)
        for drawn, heat in ((answering, temperature), (~answering, spelling_temperature)):
            drawn = drawn & writes
            if heat > 0 and bool(drawn.any()):
                chances = torch.softmax(logits[drawn] / heat, dim=-1)
                chosen[drawn] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        if budget is not None:
            thinking = thinking & ~(writes & (chosen == closing))
            chosen[thinking & (written >= budget)] = closing
            thinking = thinking & (written < budget)
        likely[alive[writes]] += own.gather(-1, chosen[writes, None])[:, 0].double()
        chosen = torch.where(writes, chosen, tokens[alive, place])
        tokens[alive, place] = chosen
        if separator is not None:
            answering = answering | (chosen == separator)
        over = writes & ((chosen == end) | (written == longest - 1))
        ends[alive[over]] = place + 1
        if bool(over.all()):
            break
        read = place
        if bool(over.any()):
            # Rows that are done leave the batch, so that a few long ones do not hold up the rest.
            keep = (~over).nonzero()[:, 0]
            alive, answering, thinking = alive[keep], answering[keep], thinking[keep]
            cache.batch_select_indices(keep.to(device))
    return [
        Written(
            tokens[row, start:stop],
            float(likely[row]),
            None if log_probs is None else log_probs[row, : stop - start],
            None if hidden is None else hidden[row, : stop - 1],
            None if attention is None else attention[row, : stop - 1, :, : stop - 1],
        )
        for row, (start, stop) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    ]
