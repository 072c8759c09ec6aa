"""What cannot work together in a config, said before a minute is spent.

Each rule yields one line: what was found, what was expected, what to do. Only the first is told,
so a rule may count on those before it.
"""

import re
from collections.abc import Iterator

from configs.schema import (
    CONTROLS,
    DIVERGENCES,
    FIDELITY,
    INSIDE,
    LOWER_IS_BETTER,
    QUALITY,
    SPLITS,
    Config,
    Model,
    Recipe,
    Schedule,
    extremes,
    nearest,
    value_at,
)

IN_NATS = ("kl_", "nll_gap")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def objections(config: Config) -> Iterator[str]:
    """Everything that speaks against an experiment, the first that should be mended first."""
    models = {"teacher.model": config.teacher.model, "students.model": config.students.model}
    models |= {f"recipes.{name}.model": recipe.model for name, recipe in config.recipes.items()}
    for key, model in models.items():
        if model:
            yield from (f"{key}: {said}" for said in to_model(model))
    for name, recipe in config.recipes.items():
        for rules in (to_objective, to_access, to_sequences, to_teachers):
            yield from (f"recipes.{name}: {said}" for said in rules(recipe))
    yield from to_names(config)
    for name, recipe in config.recipes.items():
        yield from (f"recipes.{name}.{said}" for said in to_place(config, recipe))
    yield from to_controls(config)
    yield from to_budget(config)
    yield from to_claims(config)


def to_model(model: Model) -> Iterator[str]:
    sizes = {key: getattr(model, key) for key in SIZES}
    if model.pretrained:
        given = [key for key, size in sizes.items() if size is not None]
        if given or model.settings:
            yield f"pretrained brings its own sizes: leave {', '.join(given) or 'settings'} away"
        return
    for key, size in sizes.items():
        if size is None:
            yield f"{key} is missing; this key is needed, or pretrained"
    if model.hidden_size % model.num_attention_heads:
        yield (
            f"hidden_size {model.hidden_size} is not a multiple of num_attention_heads "
            f"{model.num_attention_heads}; choose a divisor"
        )


def to_objective(recipe: Recipe) -> Iterator[str]:
    """Its terms, their weights and the temperature."""
    known = ("cross_entropy", "policy_gradient", *DIVERGENCES, *INSIDE)
    for name in recipe.objective:
        if name not in known:
            yield f"no objective {name!r}{nearest(name, known)}; there are {', '.join(known)}"
    weights = recipe.objective.values()
    if any(low < 0 or high <= 0 for low, high in map(extremes, weights)):
        yield "objective weights must be above 0; leave a term out instead"
    total = sum(value_at(weight, 0.0) for weight in weights)
    if abs(total - 1) > 1e-6:
        yield (
            f"objective weights sum to {total:g}, expected 1: a larger sum is a larger learning "
            "rate in disguise"
        )
    for progress in (1.0, *(w.until for w in weights if isinstance(w, Schedule))):
        total = sum(value_at(weight, progress) for weight in weights)
        if not 0 < total <= 1 + 1e-6:
            yield (
                f"objective weights sum to {total:g} at {progress:g} of the training, expected "
                "above 0 and at most 1"
            )
    if extremes(recipe.temperature)[0] <= 0:
        yield f"temperature {recipe.temperature} must stay above 0"


def to_access(recipe: Recipe) -> Iterator[str]:
    """What the objective needs, and what the teacher reveals."""
    terms, access = {*recipe.objective}, recipe.access
    matches = bool({*INSIDE} & terms)
    if matches != (access == "hidden"):
        yield (
            f"objectives {' and '.join(INSIDE)} and access hidden need each other; found access "
            f"{access!r} with objectives {list(recipe.objective)}"
        )
    if matches and terms <= {*INSIDE}:
        yield (
            f"objectives {list(recipe.objective)} alone leave the output layer untrained; add "
            "forward_kl"
        )
    if matches != bool(recipe.hidden_layers):
        yield (
            "hidden_layers names the teacher's layers for access hidden, as in [2, 4]; found "
            f"{recipe.hidden_layers} with access {access!r}"
        )
    if recipe.rewarded != (recipe.sequences == "student" and access == "none"):
        yield (
            "objective policy_gradient learns from right and wrong alone: it needs access none and "
            f"sequences student, which need it; found access {access!r}, sequences "
            f"{recipe.sequences!r}, objective {list(recipe.objective)}"
        )
    if recipe.rewarded and recipe.student_temperature != 1:
        yield (
            f"student_temperature {recipe.student_temperature:g}: policy_gradient is that of the "
            "policy that writes, at temperature 1; leave it away"
        )
    if recipe.rewarded and len(terms) > 1:
        yield "objective policy_gradient has a scale of its own: use it alone"
    if recipe.traces != "all" and recipe.sequences != "teacher":
        yield f"traces {recipe.traces} picks from what a teacher wrote: use sequences teacher"
    if recipe.traces == "none" and access != "text":
        yield (
            "traces none leaves answers alone, which the teacher's distributions were not revealed "
            "for: use access text"
        )
    compares = [name for name in recipe.objective if name in DIVERGENCES]
    if compares and access in ("none", "text"):
        yield (
            f"objective {compares[0]} compares distributions, but access {access!r} reveals none; "
            "use access top_k or logits, or objective cross_entropy"
        )
    if access not in ("none", "text") and not compares and not recipe.smoothed:
        yield (
            f"access {access!r} is paid for but objective cross_entropy never uses it; use access "
            "text, or add a divergence"
        )
    if access in ("top_k", "sampled") and recipe.temperature != 1:
        yield (
            f"temperature other than 1 needs access logits: the mass beyond what access {access} "
            "reveals cannot be softened, as its shape is unknown"
        )
    if access == "sampled" and compares != ["forward_kl"]:
        yield (
            "access sampled can estimate forward_kl alone, as the draws are the teacher's; found "
            f"{list(recipe.objective)}"
        )
    if "sorted_distance" in compares and access not in ("logits", "hidden"):
        yield "sorted_distance sorts all probabilities: it needs access logits"


def to_sequences(recipe: Recipe) -> Iterator[str]:
    """Who writes the training text, and who may score it."""
    access, sequences = recipe.access, recipe.sequences
    if access == "none" and sequences == "teacher":
        yield "sequences teacher needs access to its text: use access text"
    if access == "text" and sequences == "data":
        yield (
            "access text over sequences data is training on the data itself: nothing of the "
            "teacher is used; use sequences teacher, or access none for a control"
        )
    if recipe.prompts != "train" and sequences != "teacher":
        yield "invented prompts have no data to answer them: use sequences teacher"
    scores = access in ("top_k", "sampled", "logits")
    if recipe.writes_itself and not (scores or recipe.rewarded):
        yield (
            f"access {access!r} cannot score what the student writes: use access logits, top_k or "
            "sampled"
        )
    if recipe.writes_itself and "cross_entropy" in recipe.objective:
        yield (
            "objective cross_entropy would teach a student the very text that it writes itself: "
            "use divergences alone"
        )
    if extremes(recipe.on_policy)[1] > 1:
        yield f"on_policy {recipe.on_policy} is a share of the steps, at most 1"
    if sequences == "student" and recipe.on_policy:
        yield "sequences student writes at all steps: leave on_policy away"


def to_teachers(recipe: Recipe) -> Iterator[str]:
    several = len(recipe.teachers) > 1
    if several and (recipe.sequences != "data" or recipe.access == "hidden"):
        yield (
            "several teachers are averaged over sequences data and access logits, top_k or "
            "sampled: their states differ, and they would write different texts"
        )
    if len(set(recipe.teachers)) != len(recipe.teachers):
        yield f"teachers {recipe.teachers} repeat"


def to_names(config: Config) -> Iterator[str]:
    """Who is called what, and who teaches whom."""
    for name in config.recipes:
        if name in (*CONTROLS, "teacher"):
            yield f"{name!r} names the teacher or a control; call it something else"
    if len(set(config.seeds)) != len(config.seeds):
        yield f"seeds {config.seeds} repeat; every seed is one independent student"
    known = (*config.recipes, "teacher", *{"twin"} & {*config.controls})
    for name, recipe in config.recipes.items():
        for teacher in recipe.teachers:
            if teacher not in known:
                yield (
                    f"recipes.{name}.teachers: nobody is called {teacher!r}"
                    f"{nearest(teacher, ['teacher', *config.recipes])}; twin is one of controls"
                )
    if circle := {*config.recipes}.difference(*config.waves()):
        names = [name for name in config.recipes if name in circle]
        yield f"recipes {', '.join(names)} teach each other in a circle"


def to_place(config: Config, recipe: Recipe) -> Iterator[str]:
    """A recipe among its teacher, its model and its task; each line begins with a key of it."""
    prompt_weight = config.students.training.prompt_weight
    if prompt_weight > 0 and recipe.access not in ("none", "text"):
        yield (
            f"access: {recipe.access} is revealed for completions only, but "
            f"students.training.prompt_weight is {prompt_weight:g}, expected 0"
        )
    if prompt_weight > 0 and recipe.rewarded:
        yield (
            "objective: policy_gradient is told of answers alone, but students.training."
            f"prompt_weight is {prompt_weight:g}, expected 0"
        )
    spells = config.teacher.training.prompt_weight > 0 and not {*recipe.teachers} & {
        *config.recipes
    }
    if recipe.prompts != "train" and not spells:
        yield (
            "prompts: only a teacher whose training.prompt_weight is above 0 has learned to invent "
            "words"
        )
    if recipe.prompts != "train" and config.task.name == "reason":
        yield (
            "prompts: problems that a teacher invented have no answer to be judged by: use prompts "
            "train"
        )
    if (recipe.traces != "all" or recipe.rewarded) and config.task.name == "pronounce":
        yield ("traces: they and policy_gradient need a task that reasons: use task.name reason")
    model, taught_by = config.model_of(recipe), config.teacher_model_of(recipe)
    shallow, deep = model.num_hidden_layers, taught_by.num_hidden_layers
    for key in ("hidden_layers", "initial_layers"):
        layers = getattr(recipe, key)
        if layers and None in (shallow, deep):
            yield f"{key}: the layers of a pretrained model are not known here; leave it away"
        if layers and (len(layers) != shallow or not all(1 <= n <= deep for n in layers)):
            yield (
                f"{key} {layers}: expected {shallow} layers, one for each of the student's, from 1 "
                f"to the teacher's {deep}"
            )
    whole = recipe.initial_layers == [*range(1, (deep or 0) + 1)] and shallow == deep
    if recipe.initial_layers and whole and recipe.writes_itself and recipe.access != "none":
        yield (
            "initial_layers: with all layers of who teaches it the student writes what its teacher "
            "would, and is scored by itself; leave some away, or let the student start from noise"
        )
    aside = {"num_hidden_layers", "initializer_range"}
    if recipe.initial_layers and model.model_dump(exclude=aside) != taught_by.model_dump(
        exclude=aside
    ):
        yield (
            "initial_layers: layers can be taken over only if the student's model has the "
            "teacher's sizes, but for num_hidden_layers"
        )


def to_controls(config: Config) -> Iterator[str]:
    first = next(iter(config.recipes.values()))
    if "smoothed" in config.controls and config.softest() is None:
        yield (
            "the control smoothed takes the entropy of full distributions on disk: it needs a "
            "recipe with access logits or hidden, and not sequences student"
        )
    if "shuffled" in config.controls and first.access == "none":
        yield "the control shuffled mixes up the first recipe's outputs, but it has none"
    if "shuffled" in config.controls and first.writes_itself:
        yield (
            "the control shuffled mixes up stored outputs, but students of the first recipe write "
            "their own text; put another recipe first"
        )
    if "twin" in config.controls and config.teacher.epochs == 0:
        yield "the control twin is trained from another seed: leave it away"


def to_budget(config: Config) -> Iterator[str]:
    """What the teacher cost, and what a student may."""
    adopted = config.teacher.epochs == 0
    if adopted != bool(config.students.tflops):
        yield (
            "teacher.epochs 0 leaves a pretrained teacher as it is, and then students.tflops, "
            "their budget, cannot be a share of its training; set both or neither"
        )
    if (config.students.budget is None) == (config.students.tflops is None):
        yield "students: set one of budget and tflops, to say what they may cost"
    if adopted and not config.teacher.model.pretrained:
        yield "teacher.epochs 0 needs teacher.model.pretrained: it learns nothing"
    if config.task.name == "gsm8k" and not config.task.tokenizer:
        yield "task.tokenizer: missing; name the folder or hub id of the student's"


def to_claims(config: Config) -> Iterator[str]:
    """What the evaluation is to decide."""
    graded = (*QUALITY[config.task.name], *FIDELITY)
    for metric in sorted({claim.metric for claim in config.claims()} - {*graded}):
        yield (
            f"metric {metric!r} is not one of task {config.task.name}{nearest(metric, graded)}; "
            f"there are {', '.join(graded)}"
        )
    for verdict in config.claims():
        told = SPLITS[config.task.name][verdict.split]
        if told is None:
            yield f"verdict {verdict.claim!r}: task {config.task.name} has no split {verdict.split}"
        elif (steps := re.findall(r"\d", verdict.metric.partition("accuracy_")[2])) and not (
            {*map(int, steps)} <= {*told}
        ):
            yield (
                f"verdict {verdict.claim!r}: split {verdict.split} has problems of {told[0]} to "
                f"{told[-1]} steps, which {verdict.metric} does not ask for"
            )
    arms = {*config.recipes, *config.controls}
    for name in config.compare.against if config.compare else []:
        if name not in arms:
            yield f"compare.against: no arm {name!r}{nearest(name, arms)}"
    for verdict in config.verdicts:
        for name in verdict.names:
            if name not in arms | {"teacher"}:
                yield (
                    f"verdict {verdict.claim!r}: no student or control {name!r}"
                    f"{nearest(name, arms | {'teacher'})}"
                )
        if " keeps " in verdict.claim and not 0 < verdict.threshold < 1:
            yield (
                f"verdict {verdict.claim!r}: threshold {verdict.threshold:g}, expected the share "
                "that is to be kept, above 0 and below 1"
            )
        if abs(verdict.threshold) >= 1 and not verdict.metric.startswith(IN_NATS):
            yield (
                f"verdict {verdict.claim!r}: threshold {verdict.threshold:g} of {verdict.metric}, "
                f"a share; did you mean {verdict.threshold / 100:g}?"
            )
        if " keeps " in verdict.claim and verdict.metric.startswith(LOWER_IS_BETTER):
            yield (
                f"verdict {verdict.claim!r}: of {verdict.metric} less is better, nobody wants to "
                "keep it; use matches or beats"
            )
        if " matches " in verdict.claim and verdict.threshold <= 0:
            yield (
                f"verdict {verdict.claim!r} needs a threshold above 0: two arms are never equal, "
                "they are within a margin of each other"
            )
