"""The schema of a config: one YAML file describes one experiment.

A config names one teacher, the students it teaches, the controls that keep the claim honest, and
the thresholds of the verdicts, all fixed before anything runs. What cannot work is refused here,
with the reason, before a minute is spent.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

# What each task is graded in, beyond what every task has in common.
QUALITY = {
    "pronounce": ("word_error_rate", "phoneme_error_rate"),
    "reason": (
        "accuracy",
        *(f"accuracy_{steps}" for steps in (*range(1, 9), "4_5")),
        "right_steps",
        "faithfulness",
        "answer_agreement",
        "step_agreement",
    ),
    "gsm8k": ("accuracy", "answer_agreement"),
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
INSIDE = ("hidden_match", "attention_match")
CONTROLS = ("alone", "scarce", "shuffled", "smoothed", "twin")


class LabError(Exception):
    """Something the user can mend: one line that says what, where and what to do (exit code 2)."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")


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

    @model_validator(mode="after")
    def sizes_are_given_once(self) -> "Model":
        sizes = {key: getattr(self, key) for key in SIZES}
        if self.pretrained:
            given = [key for key, size in sizes.items() if size is not None]
            if given or self.settings:
                raise ValueError(
                    f"pretrained brings its own sizes: leave {', '.join(given) or 'settings'} away"
                )
            return self
        for key, size in sizes.items():
            if size is None:
                raise ValueError(f"{key} is missing; this key is needed, or pretrained")
        return self

    @model_validator(mode="after")
    def heads_divide_width(self) -> "Model":
        if self.pretrained:
            return self
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; choose a divisor"
            )
        return self


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
    prompts: Literal["train", "invented"] = "train"  # sequences teacher: whose words it answers
    transfer_rows: int | None = Field(None, gt=0)  # how many rows the teacher answers; null: all
    # Who teaches: teacher, twin, or another recipe (its first student, an assistant whose cost is
    # charged). Several are averaged.
    teachers: list[str] = Field(["teacher"], min_length=1)
    model: Model | None = None  # another shape than students.model
    initial_layers: list[int] = []  # of the teacher, that the student starts from; else from noise
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

    @model_validator(mode="after")
    def possible(self) -> "Recipe":
        known = ("cross_entropy", "policy_gradient", *DIVERGENCES, *INSIDE)
        for name in self.objective:
            if name not in known:
                raise ValueError(
                    f"no objective {name!r}{nearest(name, known)}; there are {', '.join(known)}"
                )
        if any(low < 0 or high <= 0 for low, high in map(extremes, self.objective.values())):
            raise ValueError("objective weights must be above 0; leave a term out instead")
        weights = self.objective.values()
        total = sum(value_at(weight, 0.0) for weight in weights)
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"objective weights sum to {total:g}, expected 1: a larger sum is a larger "
                "learning rate in disguise"
            )
        for progress in (1.0, *(w.until for w in weights if isinstance(w, Schedule))):
            total = sum(value_at(weight, progress) for weight in weights)
            if not 0 < total <= 1 + 1e-6:
                raise ValueError(
                    f"objective weights sum to {total:g} at {progress:g} of the training, "
                    "expected above 0 and at most 1"
                )
        if extremes(self.temperature)[0] <= 0:
            raise ValueError(f"temperature {self.temperature} must stay above 0")
        matches = bool({*INSIDE} & {*self.objective})
        if matches != (self.access == "hidden"):
            raise ValueError(
                f"objectives {' and '.join(INSIDE)} and access hidden need each other; found "
                f"access {self.access!r} with objectives {list(self.objective)}"
            )
        if matches and {*self.objective} <= {*INSIDE}:
            raise ValueError(
                f"objectives {list(self.objective)} alone leave the output layer untrained; add "
                "forward_kl"
            )
        if matches != bool(self.hidden_layers):
            raise ValueError(
                "hidden_layers names the teacher's layers for access hidden, as in [2, 4]; found "
                f"{self.hidden_layers} with access {self.access!r}"
            )
        if self.rewarded != (self.sequences == "student" and self.access == "none"):
            raise ValueError(
                "objective policy_gradient learns from right and wrong alone: it needs access none "
                f"and sequences student, which need it; found access {self.access!r}, sequences "
                f"{self.sequences!r}, objective {list(self.objective)}"
            )
        if self.rewarded and len(self.objective) > 1:
            raise ValueError("objective policy_gradient has a scale of its own: use it alone")
        if self.traces != "all" and self.sequences != "teacher":
            raise ValueError(
                f"traces {self.traces} picks from what a teacher wrote: use sequences teacher"
            )
        if self.traces == "none" and self.access != "text":
            raise ValueError(
                "traces none leaves answers alone, which the teacher's distributions were not "
                "revealed for: use access text"
            )
        compares = [n for n in self.objective if n in DIVERGENCES]
        if compares and self.access in ("none", "text"):
            raise ValueError(
                f"objective {compares[0]} compares distributions, but access {self.access!r} "
                "reveals none; use access top_k or logits, or objective cross_entropy"
            )
        if self.access not in ("none", "text") and not compares and not self.smoothed:
            raise ValueError(
                f"access {self.access!r} is paid for but objective cross_entropy never uses it; "
                "use access text, or add a divergence"
            )
        if self.access == "none" and self.sequences == "teacher":
            raise ValueError("sequences teacher needs access to its text: use access text")
        if self.access == "text" and self.sequences == "data":
            raise ValueError(
                "access text over sequences data is training on the data itself: nothing of the "
                "teacher is used; use sequences teacher, or access none for a control"
            )
        if self.access in ("top_k", "sampled") and self.temperature != 1:
            raise ValueError(
                "temperature other than 1 needs access logits: the mass beyond what access "
                f"{self.access} reveals cannot be softened, as its shape is unknown"
            )
        if self.access == "sampled" and compares != ["forward_kl"]:
            raise ValueError(
                "access sampled can estimate forward_kl alone, as the draws are the teacher's; "
                f"found {list(self.objective)}"
            )
        if "sorted_distance" in compares and self.access not in ("logits", "hidden"):
            raise ValueError("sorted_distance sorts all probabilities: it needs access logits")
        if self.prompts == "invented" and self.sequences != "teacher":
            raise ValueError("invented prompts have no data to answer them: use sequences teacher")
        scores = self.access in ("top_k", "sampled", "logits")
        if self.writes_itself and not (scores or self.rewarded):
            raise ValueError(
                f"access {self.access!r} cannot score what the student writes: use access logits, "
                "top_k or sampled"
            )
        if self.writes_itself and "cross_entropy" in self.objective:
            raise ValueError(
                "objective cross_entropy would teach a student the very text that it writes "
                "itself: use divergences alone"
            )
        if extremes(self.on_policy)[1] > 1:
            raise ValueError(f"on_policy {self.on_policy} is a share of the steps, at most 1")
        if self.sequences == "student" and self.on_policy:
            raise ValueError("sequences student writes at all steps: leave on_policy away")
        if len(self.teachers) > 1 and (self.sequences != "data" or self.access == "hidden"):
            raise ValueError(
                "several teachers are averaged over sequences data and access logits, top_k or "
                "sampled: their states differ, and they would write different texts"
            )
        if len(set(self.teachers)) != len(self.teachers):
            raise ValueError(f"teachers {self.teachers} repeat")
        return self

    @property
    def rewarded(self) -> bool:
        """Does it learn from rewards, with no text and no teacher?"""
        return "policy_gradient" in self.objective

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
    claim: str  # "<name> beats <name>", or "<name> matches <name>"
    metric: Literal[METRICS] = "sequence_agreement"
    # In the metric's own unit. beats: the difference must lie above it; matches: within it.
    threshold: float = 0.0
    split: Literal["heldout", "long"] = "heldout"

    @field_validator("claim")
    @classmethod
    def two_names(cls, value: str) -> str:
        if not re.fullmatch(r"\S+ (beats|matches) \S+", value):
            raise ValueError(
                f"claim {value!r} must read '<name> beats <name>' or '... matches ...'"
            )
        return value

    @model_validator(mode="after")
    def equal_within_something(self) -> "Verdict":
        if " matches " in self.claim and self.threshold <= 0:
            raise ValueError(
                f"claim {self.claim!r} needs a threshold above 0: two arms are never equal, they "
                "are within a margin of each other"
            )
        return self

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
    checkpoint_seconds: float = Field(30.0, ge=0)
    log_every: int = Field(50, gt=0)

    @model_validator(mode="after")
    def names_agree(self) -> "Config":
        for name in self.recipes:
            if name in (*CONTROLS, "teacher"):
                raise ValueError(f"{name!r} names the teacher or a control; call it something else")
        if "smoothed" in self.controls and self.softest() is None:
            raise ValueError(
                "the control smoothed takes the entropy of full distributions on disk: it needs a "
                "recipe with access logits or hidden, and not sequences student"
            )
        if "shuffled" in self.controls and next(iter(self.recipes.values())).access == "none":
            raise ValueError(
                "the control shuffled mixes up the first recipe's outputs, but it has none"
            )
        if "shuffled" in self.controls and next(iter(self.recipes.values())).writes_itself:
            raise ValueError(
                "the control shuffled mixes up stored outputs, but students of the first recipe "
                "write their own text; put another recipe first"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat; every seed is one independent student")
        if self.students.training.prompt_weight > 0:
            for name, recipe in self.recipes.items():
                if recipe.access not in ("none", "text"):
                    raise ValueError(
                        f"students.training.prompt_weight is above 0, but {name} learns from "
                        f"access {recipe.access!r}, which is revealed for completions only"
                    )
        for name, recipe in self.recipes.items():
            for teacher in recipe.teachers:
                if teacher not in (*self.recipes, "teacher", *{"twin"} & {*self.controls}):
                    raise ValueError(
                        f"recipes.{name}.teachers: nobody is called {teacher!r}"
                        f"{nearest(teacher, ['teacher', *self.recipes])}; twin is one of controls"
                    )
            if recipe.prompts == "invented" and (
                self.teacher.training.prompt_weight == 0 or {*recipe.teachers} & {*self.recipes}
            ):
                raise ValueError(
                    f"recipes.{name}.prompts: only a teacher whose training.prompt_weight is above "
                    "0 has learned to invent words"
                )
            shallow = self.model_of(recipe).num_hidden_layers
            deep = self.teacher_model_of(recipe).num_hidden_layers
            for key in ("hidden_layers", "initial_layers"):
                layers = getattr(recipe, key)
                if layers and None in (shallow, deep):
                    raise ValueError(
                        f"recipes.{name}.{key}: the layers of a pretrained model are not known "
                        "here; leave it away"
                    )
                if layers and (len(layers) != shallow or not all(1 <= n <= deep for n in layers)):
                    raise ValueError(
                        f"recipes.{name}.{key} {layers}: expected {shallow} layers, one for each "
                        f"of the student's, from 1 to the teacher's {deep}"
                    )
            if recipe.initial_layers:
                own, its = (
                    m.model_dump(exclude={"num_hidden_layers", "initializer_range"})
                    for m in (self.model_of(recipe), self.teacher_model_of(recipe))
                )
                if own != its:
                    raise ValueError(
                        f"recipes.{name}.initial_layers: layers can be taken over only if the "
                        "student's model has the teacher's sizes, but for num_hidden_layers"
                    )
        for name, recipe in self.recipes.items():
            if (recipe.traces != "all" or recipe.rewarded) and self.task.name == "pronounce":
                raise ValueError(
                    f"recipes.{name}: traces and policy_gradient need a task that reasons: use "
                    "task.name reason"
                )
            if recipe.prompts == "invented" and self.task.name == "reason":
                raise ValueError(
                    f"recipes.{name}.prompts: problems that a teacher invented have no answer to "
                    "be judged by: use prompts train"
                )
        if (self.teacher.epochs == 0) != bool(self.students.tflops):
            raise ValueError(
                "teacher.epochs 0 leaves a pretrained teacher as it is, and then students.tflops, "
                "their budget, cannot be a share of its training; set both or neither"
            )
        if (self.students.budget is None) == (self.students.tflops is None):
            raise ValueError("students: set one of budget and tflops, to say what they may cost")
        if self.teacher.epochs == 0 and not self.teacher.model.pretrained:
            raise ValueError("teacher.epochs 0 needs teacher.model.pretrained: it learns nothing")
        if self.teacher.epochs == 0 and "twin" in self.controls:
            raise ValueError("the control twin is trained from another seed: leave it away")
        if self.task.name == "gsm8k" and not self.task.tokenizer:
            raise ValueError("task.tokenizer: missing; name the folder or hub id of the student's")
        self.waves()
        graded = (*QUALITY[self.task.name], *FIDELITY)
        wanted = {claim.metric for claim in self.claims()}
        for metric in sorted(wanted - {*graded}):
            raise ValueError(
                f"metric {metric!r} is not one of task {self.task.name}{nearest(metric, graded)}; "
                f"there are {', '.join(graded)}"
            )
        known = {*self.recipes, *self.controls, "teacher"}
        for name in self.compare.against if self.compare else []:
            if name not in known - {"teacher"}:
                raise ValueError(f"compare.against: no arm {name!r}{nearest(name, known)}")
        for verdict in self.verdicts:
            for name in verdict.names:
                if name not in known:
                    raise ValueError(
                        f"verdict {verdict.claim!r}: no student or control {name!r}"
                        f"{nearest(name, known)}"
                    )
        return self

    def claims(self) -> list[Verdict]:
        """What the evaluation decides: the verdicts, then those of `compare`."""
        if self.compare is None:
            return self.verdicts
        compared = [
            Verdict(claim=f"{name} beats {other}", metric=metric)
            for metric in self.compare.metrics
            for other in self.compare.against
            for name in self.recipes
            if name != other
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

        ValueError if recipes teach each other in a circle.
        """
        waiting, taught, found = dict(self.recipes), {"teacher", "twin"}, []
        while waiting:
            wave = [n for n, recipe in waiting.items() if taught.issuperset(recipe.teachers)]
            if not wave:
                raise ValueError(f"recipes {', '.join(waiting)} teach each other in a circle")
            found.append(wave)
            taught.update(wave)
            for name in wave:
                del waiting[name]
        return found


def nearest(word: str, known: Any) -> str:
    """`; did you mean 'x'?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def read_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and check a YAML config, with `key.sub=value` overrides on top (values are YAML).

    Raises LabError with one line that names the file, the key, what was found and what to do.
    """
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [found.name for found in path.parent.glob("*.yaml")])
        raise LabError(f"no config file {path}{near}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    settings = read_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise LabError(f"{path} holds {type(settings).__name__}, expected keys and values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise LabError(f"override {override!r} must read key=value, as in teacher.epochs=2")
        *parents, last = key.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise LabError(f"override {override!r}: {parent!r} is a value, not a section")
        place[last] = read_yaml(value, f"override {override!r}")
    return check_config(settings, str(path))


def check_config(settings: dict, source: str) -> Config:
    """Validate settings; LabError names the first key at fault."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise LabError(f"{source}: {explain(error.errors()[0])}") from None


def read_yaml(text: str, source: str) -> Any:
    """Plain YAML only: no tags that build objects, no aliases that blow up."""
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise LabError(f"{source}: YAML aliases (*{event.anchor}) are not accepted")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise LabError(
            f"{source}: not plain YAML{where}: {getattr(error, 'problem', None) or error}"
        ) from None


def explain(error: Any) -> str:
    """One pydantic error as one line: the key, what was found, what was expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, last = error["loc"]
        section: Any = Config
        for parent in parents:
            section = section_of(section, str(parent))
        known = list(section.model_fields) if section else []
        near = nearest(str(last), known) or f"; known here: {', '.join(known)}"
        return f"unknown key {key!r}{near}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if error["type"] == "missing":
        return f"{key}: missing; this key is needed"
    return f"{key}: found {error['input']!r}; {message[0].lower()}{message[1:]}"


def section_of(section: Any, key: str) -> Any:
    """The schema class under `key`, looking through dicts and lists of sections."""
    if section is None or key not in getattr(section, "model_fields", {}):
        return section  # the name of a recipe, or a place in a list
    annotation = section.model_fields[key].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
