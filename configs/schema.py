"""The schema of a config: one YAML file describes one experiment.

A config names one teacher, the students it teaches, the controls that keep the claim honest, and
the thresholds of the verdicts, all fixed before anything runs. What a key may hold stands here;
what cannot work together, in configs/rules.py.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What each task is graded in, beyond what every task has in common.
QUALITY = {
    "pronounce": ("word_error_rate", "phoneme_error_rate"),
    "reason": (
        "accuracy",
        *(f"accuracy_{steps}" for steps in (*range(1, 9), "4_5")),
        "right_steps",
        "sound_steps",
        "answer_follows",
        "faithfulness",
        "answer_agreement",
        "step_agreement",
    ),
    "gsm8k": ("accuracy", "answer_agreement"),
}
# The splits that each is judged on; of word problems, the numbers of steps there.
SPLITS = {
    "pronounce": {"heldout": (), "long": ()},
    "reason": {"heldout": (1, 2, 3, 4, 5), "long": (6, 7, 8)},
    "gsm8k": {"heldout": (), "long": None},
}
FIDELITY = (
    "kl_teacher_student",
    "kl_student_teacher",
    "top1_agreement",
    "nll_gap",
    "sequence_agreement",
    "agreement_on_teacher_errors",
    "ece",
)
LOWER_IS_BETTER = ("word_error_rate", "phoneme_error_rate", "kl_", "nll_gap", "ece")
METRICS = (*(metric for metrics in QUALITY.values() for metric in metrics), *FIDELITY)
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "generalised_jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "total_variation",
    "sorted_distance",
)
INSIDE = ("hidden_match", "attention_match", "relation_match")
CONTROLS = ("alone", "scarce", "shuffled", "smoothed", "twin")


class LabError(Exception):
    """Something the user can mend: one line that says what, where and what to do (exit code 2)."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class Model(Section):
    """A transformers model to build, or one to start from; the names are those of the transformers
    configs."""

    pretrained: str | None = None  # a folder or a hub id: its shape and its weights
    architecture: str = "llama"
    hidden_size: int | None = Field(None, gt=0)
    num_hidden_layers: int | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    intermediate_size: int | None = Field(None, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    settings: dict[str, Any] = {}  # anything else the transformers config of this architecture has


Share = Annotated[float, Field(ge=0, lt=1)]


class Training(Section):
    """AdamW with warm-up and cosine decay; the same for teacher, student and control."""

    learning_rate: float = Field(3e-3, gt=0)
    batch_rows: int = Field(256, gt=0)
    accumulation: int = Field(1, gt=0)  # micro-batches per step; the result does not depend on it
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    final_fraction: float = Field(0.0, ge=0, le=1)  # of the learning rate, at the last step
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.98)
    clip_norm: float = Field(1.0, gt=0)
    # What a token of the prompt counts for in the loss; one of the completion counts for 1. Above
    # 0 a model also learns to write prompts; a student of distributions has them at answers only.
    prompt_weight: float = Field(0.0, ge=0, le=1)


class Teacher(Section):
    model: Model
    training: Training
    epochs: float = Field(ge=0, lt=1e6)  # 0: a pretrained teacher, as it is
    seed: int = Field(0, ge=0)


class Schedule(Section):
    """A number that goes in a straight line from `start` to `end`, which it reaches at `until` of
    the training and then keeps."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    until: float = Field(1.0, gt=0, le=1)


Scheduled = float | Schedule  # a number, or one that changes as the training goes on


def value_at(scheduled: Scheduled, progress: float) -> float:
    """The number at `progress`, 0 at the first step of a training and 1 after the last."""
    if not isinstance(scheduled, Schedule):
        return scheduled
    share = min(1.0, progress / scheduled.until)
    return scheduled.start + share * (scheduled.end - scheduled.start)


def extremes(scheduled: Scheduled) -> tuple[float, float]:
    """(least, greatest) of the values that a number takes during a training."""
    ends = value_at(scheduled, 0.0), value_at(scheduled, 1.0)
    return min(ends), max(ends)


class Recipe(Section):
    """A distillation method is three choices: access, sequences, objective. The rest is dosage."""

    access: Literal["none", "text", "top_k", "sampled", "logits", "hidden"] = "logits"
    sequences: Literal["data", "teacher", "student"] = "data"
    # terms and their weights, which sum to 1 at the start
    objective: dict[str, Scheduled] = {"forward_kl": 1.0}
    temperature: Scheduled = 1.0  # of the divergence: both distributions are softened
    temperature_squared: bool = True  # divergences times T^2, so that gradients keep their scale
    beta: float = Field(0.5, gt=0, lt=1)  # generalised JSD: share of the teacher in the mixture
    skew: float = Field(0.1, gt=0, lt=1)  # skewed KLs: share of the first in the mixture
    head: float = Field(0.5, gt=0, lt=1)  # adaptive KL: probability of the teacher's head
    k: int = Field(8, gt=0)  # access top_k: how many probabilities the teacher reveals; or draws
    stored_as: Literal["float16", "bfloat16"] = "float16"  # the numbers of the outputs on disk
    hidden_layers: list[int] = []  # access hidden: a layer of the teacher for each of the student
    # Share of the steps whose answers the student writes and the teacher scores, live; sequences
    # student: all of them.
    on_policy: Scheduled = 0.0
    student_temperature: float = Field(1.0, ge=0)  # at which it writes them
    sampling_temperature: float = Field(0.0, ge=0)  # sequences teacher: 0 writes greedily
    # sequences teacher: whose words it answers. train: those of the data; invented: its own;
    # extended: those of the data first, and past them its own.
    prompts: Literal["train", "extended", "invented"] = "train"
    transfer_rows: int | None = Field(None, gt=0)  # how many rows the teacher answers; null: all
    # Who teaches: teacher, twin, or another recipe (its first student, an assistant whose cost is
    # charged). Several are averaged.
    teachers: list[str] = Field(["teacher"], min_length=1)
    model: Model | None = None  # another shape than students.model
    initial_layers: list[int] = []  # of the teacher, that the student starts from; else from noise
    learning_rate: float | None = Field(None, gt=0)  # another than students.training has
    budget_share: float = Field(1.0, gt=0, le=1)  # how much of students.budget this may spend
    charged: bool = True  # for its outputs; a study of ever more of them trains equally long on all
    # Tasks that show their reasoning: a student learns from all traces, from those with a right
    # answer (rejection sampling), or from answers alone.
    traces: Literal["all", "right", "none"] = "all"
    group: int = Field(8, gt=1)  # objective policy_gradient: answers to each prompt of a step
    label_fraction: float = Field(1.0, gt=0, le=1)  # access none: share of training words labelled
    shuffled: bool = False  # outputs of the wrong rows (a control)
    smoothed: bool = False  # uniform label smoothing, as much entropy as the teacher's (a control)

    @model_validator(mode="before")
    @classmethod
    def older_runs(cls, values: Any) -> Any:
        """`match_until`, which results and runs of an older version hold, said once for both terms
        where they fade to 0."""
        if not isinstance(values, dict) or "match_until" not in values:
            return values
        until, objective = values["match_until"], values.get("objective")
        values = {key: value for key, value in values.items() if key != "match_until"}
        if isinstance(objective, dict):
            values["objective"] = {
                name: {"start": weight, "end": 0, "until": until} if name in INSIDE else weight
                for name, weight in objective.items()
            }
        return values

    @field_validator("objective", mode="before")
    @classmethod
    def one_name_is_one_term(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value

    @property
    def rewarded(self) -> bool:
        """Does it learn from rewards, with no text and no teacher?"""
        return "policy_gradient" in self.objective

    @property
    def relations(self) -> bool:
        """Does the teacher reveal the relations of its values?"""
        return "relation_match" in self.objective

    @property
    def writes_itself(self) -> bool:
        """Does the student write some of its own training text?"""
        return self.sequences == "student" or extremes(self.on_policy)[1] > 0


class Students(Section):
    """What every student and control shares, so that they differ in the recipe alone."""

    model: Model
    training: Training = Training()
    # FLOPs of the teacher's outputs and one student: as a share of the teacher's training FLOPs,
    # or, where nobody here trained the teacher, in TFLOPs
    budget: float | None = Field(None, gt=0, le=10)
    tflops: float | None = Field(None, gt=0)


class Verdict(Section):
    claim: str  # "<name> beats <name>", "... matches ..." or "... keeps ..."
    metric: Literal[METRICS] = "sequence_agreement"
    # In the metric's own unit. beats: the difference must lie above it; matches: within it. keeps:
    # the first must have at least this share of what the second has.
    threshold: float = 0.0
    split: Literal["heldout", "long"] = "heldout"

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
    """Every recipe against some arms, in a table: verdicts that are corrected together."""

    against: list[str] = Field(min_length=1)
    metrics: list[Literal[METRICS]] = Field(["sequence_agreement"], min_length=1)


class Cost(Section):
    price_per_hour: float = Field(0.10, ge=0)  # money per hour of this machine, any currency
    currency: str = "USD"
    watts_per_thread: float = Field(4.0, gt=0)  # the stated estimate where no meter can be read


class Task(Section):
    name: Literal["pronounce", "reason", "gsm8k"] = "pronounce"
    # pronounce: use only so many words, for tests; reason: how many problems there are to train on
    limit: int | None = Field(None, ge=100)
    tokenizer: str | None = None  # gsm8k: a folder or a hub id
    folder: str | None = None  # gsm8k: where train.jsonl and test.jsonl lie; null: from the hub


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    task: Task = Task()
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    threads: int | None = Field(None, gt=0)  # null: the physical cores, at most 8
    workers: int = Field(1, gt=0)  # processes that share the threads when several models train
    precision: Literal["float32", "float64"] = "float32"  # float64: the same on every machine
    teacher: Teacher
    students: Students
    recipes: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")], Recipe] = Field(
        min_length=1
    )
    controls: list[Literal["alone", "scarce", "shuffled", "smoothed", "twin"]] = [
        "alone",
        "scarce",
        "shuffled",
    ]
    verdicts: list[Verdict] = []
    compare: Compare | None = None
    cost: Cost = Cost()
    # A checkpoint is written when either is over, where the next line of the log ends.
    checkpoint_seconds: float = Field(30.0, ge=0)
    checkpoint_steps: int = Field(5_000, gt=0)
    log_every: int = Field(50, gt=0)

    def claims(self) -> list[Verdict]:
        """What the evaluation decides: the verdicts, then those of `compare`, of all recipes that
        may spend the whole budget."""
        if self.compare is None:
            return self.verdicts
        compared = [
            Verdict(claim=f"{name} beats {other}", metric=metric)
            for metric in self.compare.metrics
            for other in self.compare.against
            for name, recipe in self.recipes.items()
            if name != other and recipe.budget_share == 1
        ]
        return [*self.verdicts, *compared]

    def softest(self) -> Recipe | None:
        """The first recipe whose outputs tell how soft the teacher is."""
        full = [
            recipe
            for recipe in self.recipes.values()
            if recipe.access in ("logits", "hidden") and recipe.sequences != "student"
        ]
        return full[0] if full else None

    def model_of(self, recipe: Recipe) -> Model:
        """The shape of a recipe's students."""
        return recipe.model or self.students.model

    def teacher_model_of(self, recipe: Recipe) -> Model:
        """The shape of who teaches them; the first of several."""
        first = recipe.teachers[0]
        if first in self.recipes:
            return self.model_of(self.recipes[first])
        return self.teacher.model

    def waves(self) -> list[list[str]]:
        """Names of recipes in the order of training: who teaches another comes in an earlier wave.
        Those that teach each other in a circle are in none."""
        waiting, taught, found = dict(self.recipes), {"teacher", "twin"}, []
        while wave := [n for n, recipe in waiting.items() if taught.issuperset(recipe.teachers)]:
            found.append(wave)
            taught.update(wave)
            for name in wave:
                del waiting[name]
        return found


def nearest(word: str, known: Any) -> str:
    """`; did you mean 'x'?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
