"""The shape of a config: one YAML file describes one experiment.

A config names one teacher, the students it teaches, the controls that keep the comparison honest,
and the verdicts, all fixed before anything runs. Tasks, access levels, objectives and metrics are
plain names here; experiment/rules.py looks them up in their tables and rejects what cannot work
together.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class LabError(Exception):
    """A problem the user can fix: one line that says what, where and what to do (exit code 2)."""


# Keys of a config that set where a run is kept and how it runs on a machine, not what it computes.
MACHINE_KEYS = (
    "name", "threads", "workers", "cost", "checkpoint_seconds", "checkpoint_steps", "trackers",
)  # fmt: skip

# Bounds far beyond use: what is larger is a mistake, and might take hours to fail.
Size = Annotated[int, Field(gt=0, le=100_000)]
Count = Annotated[int, Field(gt=0, le=1_000_000_000)]
Layers = Annotated[list[int], Field(max_length=1_000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def added(default: Any, **bounds: Any) -> Any:
    """A key that came later: with its default, a config has the hash that it had before."""
    return Field(default, exclude_if=lambda value: value == default, **bounds)


# YAML reads a bare yes or no as a truth value.
Answer = Annotated[
    Literal["yes", "no", "unknown"],
    BeforeValidator(lambda value: ("no", "yes")[value] if isinstance(value, bool) else value),
]


class TaskConfig(Section):
    """What is learned. Every task adds its own keys to `name`; see its `Settings`."""

    model_config = ConfigDict(extra="allow")

    name: str = "pronounce"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Model(Section):
    """A model to build, or a pretrained one to start from. Keys are named as in transformers."""

    # Its shape and its weights: a folder, a hub id, or a GGUF file (a path, package/file.gguf of an
    # installed package, or organisation/repository/file.gguf of the hub).
    pretrained: str | None = None
    revision: str | None = added(None)  # of a hub id: a branch, tag or commit
    # Of a teacher that stays unchanged: the type of its weights; null: the config's precision.
    dtype: Literal["bfloat16", "float16"] | None = added(None)
    attention: Literal["eager", "sdpa", "flash_attention_2"] = added("eager")
    architecture: str = "llama"
    hidden_size: Size | None = None
    num_hidden_layers: int | None = Field(None, gt=0, le=1_000)
    num_attention_heads: Size | None = None
    intermediate_size: Count | None = None
    initializer_range: float = Field(0.02, gt=0)
    settings: dict[str, Any] = {}  # other keys of this architecture's config


Share = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    """AdamW with warm-up and cosine decay, for teacher, student and control alike."""

    learning_rate: float = Field(3e-3, gt=0)
    batch_rows: Count = 256
    accumulation: Count = 1  # micro-batches per step; the result does not depend on it
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    final_fraction: float = Field(0.0, ge=0, le=1)  # of the learning rate, at the last step
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.98)
    clip_norm: float = Field(1.0, gt=0)
    # Weight of a prompt token in the loss; completion tokens have weight 1. Above 0 a model also
    # learns to write prompts. Students of stored distributions need 0: only completions have them.
    prompt_weight: float = Field(0.0, ge=0, le=1)
    # The type of the matrix products in a step; weights and optimizer keep the config's precision.
    autocast: Literal["bfloat16"] | None = added(None)
    # Recompute activations in the backward pass: less memory for a third more FLOPs (charged).
    activation_checkpointing: bool = added(False)
    compile: bool = added(False)  # with torch.compile


class Api(Section):
    """Outputs are bought, token by token, from an endpoint of OpenAI's API."""

    # Where, as in https://api.example.com/v1; null: this run's own teacher, served on this machine
    # while its outputs are collected, to an account of each recipe's kind of access.
    url: str | None = None
    model: str | None = None  # its name there
    key_env: str | None = None  # the environment variable that holds the key
    endpoint: Literal["chat", "completions"] = "chat"
    # More fields of every request, for what a server knows beyond OpenAI's API: llama.cpp's draws
    # from all tokens with {top_k: 0, min_p: 0} only.
    body: dict[str, Any] = {}
    at_once: int = Field(32, gt=0, le=1_000)  # requests in flight
    # Per million tokens of prompts and answers, for a server that does not state them.
    price_in: float = Field(0.0, ge=0)
    price_out: float = Field(0.0, ge=0)
    # Of the watermark and the canaries in the answers of a run's own server; a real one is kept in
    # a file.
    watermark_key: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    canaries: float = Field(0.0, ge=0, le=1)  # share of the prompts whose answers name the account
    # What one set of outputs may cost at most. Nothing is asked that could exceed it.
    budget_tokens: Count | None = None
    budget_money: float | None = Field(None, gt=0)
    # What the terms say, for a server that does not state them.
    allows_distillation: Answer = "unknown"
    permission: str | None = Field(None, min_length=1)  # who allowed it, where the terms do not
    # Of each evaluation split, how many rows the teacher behind a url answers: where its weights
    # are unknown, its answers there are all that students can be compared with.
    evaluation_rows: Count = 500


class Published(Section):
    """What others publish of a pretrained teacher. Nothing of it is measured here."""

    source: str = Field(min_length=1)  # where the figures and the terms are stated
    # What it was trained on; its training is counted as 6 FLOPs per parameter and token (Kaplan et
    # al. 2020, arXiv 2001.08361, section 2.1).
    parameters: float = Field(gt=0, lt=1e15)
    tokens: float = Field(gt=0, lt=1e18)
    licence: str = "unknown"
    allows_distillation: Answer = "unknown"
    permission: str | None = Field(None, min_length=1)  # who allowed it, where the licence does not

    @property
    def flops(self) -> float:
        return 6 * self.parameters * self.tokens


class Teacher(Section):
    model: Model | None = None  # None: behind api.url
    training: Training = Training()
    epochs: float = Field(0, ge=0, lt=1e6)  # 0: a pretrained teacher, unchanged
    seed: Seed = 0
    api: Api | None = added(None)
    published: Published | None = added(None)


class Schedule(Section):
    """A value that moves linearly from `start` to `end` until the fraction `until` of training, and
    then stays there."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    until: float = Field(1.0, gt=0, le=1)


Scheduled = float | Schedule


def value_at(scheduled: Scheduled, progress: float) -> float:
    """The value at `progress`: 0 at the first step of a training, 1 after the last."""
    if not isinstance(scheduled, Schedule):
        return scheduled
    share = min(1.0, progress / scheduled.until)
    return scheduled.start + share * (scheduled.end - scheduled.start)


def extremes(scheduled: Scheduled) -> tuple[float, float]:
    """(smallest, largest) value during a training."""
    ends = value_at(scheduled, 0.0), value_at(scheduled, 1.0)
    return min(ends), max(ends)


class OutputsSettings(Section):
    """What the teacher writes and reveals, and how much of it the student reads."""

    transfer_rows: Count | None = None  # how many rows the teacher answers; null: all
    k: Count = 8  # access top_k: probabilities per position; access sampled: draws
    layers: Layers = []  # access hidden: one teacher layer per student layer
    temperature: float = Field(0.0, ge=0)  # the teacher's sampling temperature; 0: greedy
    # Which prompts it answers. train: those of the data; invented: prompts it writes itself;
    # extended: those of the data first, then invented ones.
    prompts: Literal["train", "extended", "invented"] = "train"
    # Tasks with reasoning: the student reads all answers, those with the right result (rejection
    # sampling), or all of them without the reasoning.
    traces: Literal["all", "right", "none"] = "all"
    charged: bool = True  # to the student's budget; false in studies that vary the outputs
    # With teacher.api: the bias of the watermark in these answers, in nats; null: without.
    watermark: float | None = added(None, gt=0, le=20)
    # How much the teacher avoids what would teach a student well, and the recipe whose first
    # student stands for those that it does not know.
    antidistillation: float | None = added(None, gt=0, le=1e6)
    proxy: str | None = added(None)
    # Of the prompts, whose answers are marked; null: all.
    watermark_share: float | None = added(None, gt=0, lt=1)


class DivergenceSettings(Section):
    """Parameters of the divergences; each uses those in its formula."""

    temperature_squared: bool = True  # multiply by T^2, so that gradients keep their scale
    beta: float = Field(0.5, gt=0, lt=1)  # generalised JSD: weight of the teacher in the mixture
    skew: float = Field(0.1, gt=0, lt=1)  # skewed KLs: weight of the first distribution


class StudentSettings(Section):
    """How the student of this recipe differs from the others."""

    model: Model | None = None  # overrides students.model
    initial_layers: Layers = []  # teacher layers to start from; empty: random weights
    learning_rate: float | None = Field(None, gt=0)  # overrides students.training.learning_rate
    budget_fraction: float = Field(1.0, gt=0, le=1)  # of the students' budget
    seeds: int | None = Field(
        None, gt=0
    )  # how many of the config's seeds, from the first; null: all
    # Fraction of the steps in which the student writes the text and the teacher scores it live;
    # all steps with sequences student.
    on_policy: Scheduled = 0.0
    temperature: float = Field(1.0, ge=0)  # its sampling temperature
    group: int = Field(8, gt=1, le=100_000)  # objective policy_gradient: answers per prompt


class ControlSettings(Section):
    """What turns a recipe into a control."""

    label_fraction: float = Field(1.0, gt=0, le=1)  # access none: of the training rows
    shuffled: bool = False  # outputs of the wrong rows
    smoothed: bool = False  # uniform label smoothing with the teacher's mean entropy
    gold: bool = False  # access none: the rows that the first recipe's teacher answers, at its cost


class Recipe(Section):
    """A distillation method: three choices and their settings."""

    access: str = "logits"  # what the teacher reveals
    sequences: Literal["data", "teacher", "student"] = "data"  # who writes the training text
    objective: dict[str, Scheduled] = {"forward_kl": 1.0}  # terms and weights that sum to 1
    temperature: Scheduled = 1.0  # of the divergence: both distributions are softened
    # Who teaches: teacher, second_teacher, or another recipe (an assistant: its first student,
    # whose cost is charged). Several are averaged.
    teachers: list[str] = Field(["teacher"], min_length=1, max_length=100)
    outputs: OutputsSettings = OutputsSettings()
    divergence: DivergenceSettings = DivergenceSettings()
    student: StudentSettings = StudentSettings()
    control: ControlSettings = ControlSettings()

    @field_validator("objective", mode="before")
    @classmethod
    def one_name_is_one_term(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value

    @property
    def writes_itself(self) -> bool:
        """Whether the student writes some of its own training text."""
        return self.sequences == "student" or extremes(self.student.on_policy)[1] > 0


class Students(Section):
    """What every student and control has in common."""

    model: Model
    training: Training = Training()
    # FLOPs of the teacher's outputs and one student: as a fraction of the teacher's training FLOPs
    # or, where the teacher was not trained here, in TFLOPs.
    budget: float | None = Field(None, gt=0)
    tflops: float | None = Field(None, gt=0)

    @field_validator("budget")
    @classmethod
    def a_fraction(cls, value: float | None) -> float | None:
        if value is not None and value > 1:
            raise ValueError(
                f"found {value:g}, expected a fraction of the teacher's training FLOPs, such as "
                f"{value / 100:g} for {value:g} %; for more than 1, set tflops instead"
            )
        return value


class Verdict(Section):
    """A claim that the evaluation tests, fixed beforehand."""

    claim: str  # "<name> beats <name>", "... matches ..." or "... keeps ..."
    metric: str = "sequence_agreement"
    # In the metric's unit. beats: the difference must exceed it; matches: stay within it. keeps:
    # the first must have at least this share of the second's value.
    threshold: float = 0.0
    split: str = "heldout"
    exploratory: bool = False  # decided alike, but found by looking: a claim for another run

    @field_validator("claim")
    @classmethod
    def two_names(cls, value: str) -> str:
        if not re.fullmatch(r"\S+ (beats|matches|keeps) \S+", value):
            raise ValueError(
                f"claim {value!r} must read '<name> beats <name>', '... matches ...' or "
                "'... keeps ...'"
            )
        return value

    @property
    def names(self) -> tuple[str, str]:
        first, _, second = self.claim.split()
        return first, second


class Compare(Section):
    """Compare every recipe with some models, in a table; all verdicts are corrected together."""

    against: list[str] = Field(min_length=1, max_length=100)
    metrics: list[str] = Field(["sequence_agreement"], min_length=1, max_length=100)


class Cost(Section):
    price_per_hour: float = Field(0.10, ge=0)  # money per hour of this machine, any currency
    currency: str = "USD"
    watts_per_thread: float = Field(4.0, gt=0)  # estimate where no energy counter is readable


# What each control learns from, and the question that it answers.
CONTROLS = {
    "baseline": "the teacher's training data, at the same total FLOPs: do outputs teach better?",
    "low_data": "5 % of that data, at the same FLOPs: what is possible without the teacher?",
    "shuffled": "the teacher's outputs for the wrong rows: does their content matter?",
    "gold": "the data's answers for the rows that the teacher answers, at the same cost: does it "
    "matter who answered?",
    "smoothed": "the data, with label smoothing at the teacher's entropy: are soft labels enough?",
    "second_teacher": "a second teacher from another seed: how closely do two teachers agree?",
}


class Tune(Section):
    """What `train.py CONFIG --tune` tries. Every recipe and control gets the same number of tries:
    all pairs of a learning rate and a number of transfer rows or, if it needs no outputs or has its
    own transfer_rows, as many learning rates from the smallest to the largest."""

    learning_rate: list[Annotated[float, Field(gt=0)]] = Field(min_length=1, max_length=100)
    transfer_rows: list[Count] = Field([], max_length=100)
    # Equally many rates for recipes or controls that need others, such as rewards.
    other_rates: dict[str, list[Annotated[float, Field(gt=0)]]] = {}
    seed: Seed  # of the students that are tried; never one that is judged

    @property
    def tries(self) -> int:
        return len(self.learning_rate) * max(1, len(self.transfer_rows))

    def rates(self, name: str) -> list[float]:
        return self.other_rates.get(name, self.learning_rate)


class Try(Section):
    learning_rate: float = Field(gt=0)
    transfer_rows: Count | None = None
    validation: dict[str, float]  # metrics on the validation split


class Tuned(Section):
    """What `train.py CONFIG --tune` found. The best try of each recipe and control is in force."""

    metric: str  # by which a try was chosen
    config: str  # sha256 of what was tuned
    flops: float
    seconds: float
    joules: float
    money: float
    tries: dict[str, Annotated[list[Try], Field(min_length=1)]]  # by recipe or control, best first


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: TaskConfig = TaskConfig()
    seeds: list[Seed] = Field(min_length=1, max_length=1_000)
    threads: int | None = Field(None, gt=0, le=1_000)  # null: the physical cores, at most 8
    workers: int = Field(1, gt=0, le=100)  # processes that share the threads
    precision: Literal["float32", "float64"] = "float32"  # float64: the same on every machine
    teacher: Teacher
    students: Students
    recipes: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")], Recipe] = Field(
        min_length=1, max_length=1_000
    )
    controls: list[Literal[tuple(CONTROLS)]] = ["baseline", "low_data", "shuffled"]
    verdicts: list[Verdict] = Field([], max_length=10_000)
    compare: Compare | None = None
    tune: Tune | None = None
    tuned: Tuned | None = None
    cost: Cost = Cost()
    # A checkpoint is due after either, and is written with the next log line.
    checkpoint_seconds: float = Field(30.0, ge=0)
    checkpoint_steps: int = Field(5_000, gt=0)
    log_every: int = Field(50, gt=0)
    # Where else the log goes, by accelerate's trackers; each is a package to install.
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = added([])

    @model_validator(mode="before")
    @classmethod
    def recipes_have_their_tuned_values(cls, settings: Any) -> Any:
        """The best try fills in a recipe's learning rate and transfer rows, unless it has its own;
        controls are filled in by the plan."""
        tuned, recipes = (dict_in(settings, key) for key in ("tuned", "recipes"))
        filled = {}
        for name, tries in dict_in(tuned, "tries").items():
            if not (isinstance(tries, list) and tries and isinstance(recipes.get(name), dict)):
                continue  # a control, or of another shape, as validation says
            filled[name] = dict(recipes[name])
            places = ("student", "learning_rate"), ("outputs", "transfer_rows")
            for section, key in places:
                there, value = dict_in(recipes[name], section), dict_in(tries, 0).get(key)
                if value is not None and there.get(key) is None:
                    filled[name][section] = {**there, key: value}
        return {**settings, "recipes": {**recipes, **filled}} if filled else settings

    def best_try(self, name: str) -> Try | None:
        """Of a recipe or control."""
        return self.tuned.tries[name][0] if self.tuned and name in self.tuned.tries else None

    def claims(self) -> list[Verdict]:
        """All claims to test: the verdicts, then those of `compare` for every recipe with the full
        budget."""
        if self.compare is None:
            return self.verdicts
        compared = [
            Verdict(claim=f"{name} beats {other}", metric=metric)
            for metric in self.compare.metrics
            for other in self.compare.against
            for name, recipe in self.recipes.items()
            if name != other and recipe.student.budget_fraction == 1
        ]
        return [*self.verdicts, *compared]

    def model_of(self, recipe: Recipe) -> Model:
        """The shape of a recipe's students."""
        return recipe.student.model or self.students.model

    @property
    def sold_elsewhere(self) -> bool:
        """Whether the teacher is behind an endpoint at a url, and its weights are unknown."""
        return self.teacher.api is not None and self.teacher.api.url is not None

    def teacher_model_of(self, recipe: Recipe) -> Model | None:
        """The shape of the first model that teaches them, where it is known."""
        first = recipe.teachers[0]
        return self.model_of(self.recipes[first]) if first in self.recipes else self.teacher.model


def dict_in(place: Any, key: Any) -> dict:
    """What is under a key of settings that are not validated yet, if it is a section."""
    try:
        value = place[key]
    except (TypeError, KeyError, IndexError):
        return {}
    return value if isinstance(value, dict) else {}


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
