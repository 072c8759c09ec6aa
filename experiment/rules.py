"""Rules: invalid combinations are rejected when the config is read.

Each rule yields one line: what was found, what was expected, what to do. Only the first problem is
reported, so a rule may assume that the rules before it hold.
"""

from collections.abc import Iterator

from pydantic import ValidationError

from configs.schema import (
    CONTROLS,
    Config,
    Model,
    Recipe,
    Schedule,
    Section,
    extremes,
    nearest,
    value_at,
)
from experiment.api_rules import check_api
from experiment.claims import check_claims
from experiment.plan import TEACHERS, Plan
from experiment.tries import rank, tries_of, tuned_for, untuned
from measure.metrics import metrics_of
from models.classifier import CLASSIFIERS
from student.objectives import OBJECTIVES
from student.recipe import learns_from_rewards
from tasks import TASKS
from tasks.task import Task
from teacher.access import ACCESS

HOTTEST = 100.0  # temperature
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def objections(config: Config) -> Iterator[str]:
    """Everything that is wrong with an experiment, in the order in which to fix it."""
    yield from check_task(config)
    task = TASKS[config.task.name]
    models = {"teacher.model": config.teacher.model, "students.model": config.students.model}
    for name, recipe in config.recipes.items():
        models[f"recipes.{name}.student.model"] = recipe.student.model
    for key, model in models.items():
        if model:
            yield from (f"{key}: {problem}" for problem in check_model(model))
    for name, recipe in config.recipes.items():
        for rule in (check_names, check_objective, check_access, check_sequences, check_teachers,
                     check_proxy):  # fmt: skip
            yield from (f"recipes.{name}: {problem}" for problem in rule(recipe))
    yield from check_recipe_names(config)
    yield from check_api(config, task)
    for name, recipe in config.recipes.items():
        yield from (f"recipes.{name}.{p}" for p in check_recipe_in_config(config, recipe, task))
    yield from check_controls(config)
    yield from check_tuning(config)
    yield from check_budget(config)
    yield from check_published(config)
    yield from check_claims(config, task)


def check_task(config: Config) -> Iterator[str]:
    """The task exists, and its keys are valid."""
    name = config.task.name
    if name not in TASKS:
        yield f"task.name: no task {name!r}{nearest(name, TASKS)}; there are {', '.join(TASKS)}"
        return
    task = TASKS[name]
    try:
        settings: Section = task.Settings(**config.task.settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = task.Settings.model_fields
        if first["type"] == "extra_forbidden":
            hint = nearest(key, known) or f"; task {name} has {', '.join(known) or 'no keys'}"
            yield f"unknown key 'task.{key}'{hint}"
        else:
            yield f"task.{key}: found {first['input']!r}; {first['msg'].lower()}"
        return
    yield from (f"task.{problem}" for problem in task.objections(settings))


def check_model(model: Model) -> Iterator[str]:
    if not model.pretrained:
        given = [key for key in ("revision", "dtype") if getattr(model, key)]
        if given:
            yield f"{given[0]} belongs to a pretrained model; remove it, or name one"
    if model.architecture in CLASSIFIERS and model.attention != "eager":
        yield f"attention: {model.architecture} has none; remove it"
    needed = SIZES[:2] if model.architecture in CLASSIFIERS else SIZES
    sizes = {key: getattr(model, key) for key in needed}
    if model.pretrained:
        given = [key for key, size in sizes.items() if size is not None]
        if given or model.settings:
            yield f"a pretrained model has its own sizes: remove {', '.join(given) or 'settings'}"
        return
    for key, size in sizes.items():
        if size is None:
            yield f"{key} is missing; this key is needed, or pretrained"
    if model.num_attention_heads and model.hidden_size % model.num_attention_heads:
        yield (
            f"hidden_size {model.hidden_size} is not a multiple of num_attention_heads "
            f"{model.num_attention_heads}; choose a divisor"
        )


def check_names(recipe: Recipe) -> Iterator[str]:
    """Access and objectives are in their tables."""
    if recipe.access not in ACCESS:
        near = nearest(recipe.access, ACCESS)
        yield f"no access {recipe.access!r}{near}; there are {', '.join(ACCESS)}"
    for name in recipe.objective:
        if name not in OBJECTIVES:
            near = nearest(name, OBJECTIVES)
            yield f"no objective {name!r}{near}; there are {', '.join(OBJECTIVES)}"


def check_objective(recipe: Recipe) -> Iterator[str]:
    """Weights and temperature."""
    weights = recipe.objective.values()
    if any(low < 0 or high <= 0 for low, high in map(extremes, weights)):
        yield "objective weights must be above 0; remove the term instead"
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
    low, high = extremes(recipe.temperature)
    if low <= 0 or high > HOTTEST:
        yield (
            f"temperature {recipe.temperature} must stay above 0 and at most {HOTTEST}, where all "
            "outcomes look alike"
        )


def check_access(recipe: Recipe) -> Iterator[str]:
    """The teacher reveals what the objective needs, and what it reveals is used."""
    terms = {name: OBJECTIVES[name] for name in recipe.objective}
    access, reveals = recipe.access, ACCESS[recipe.access].reveals
    over_states = [name for name, term in terms.items() if term.over_states]
    if bool(over_states) != ("states" in reveals):
        yield (
            f"access {access!r} with objectives {', '.join(terms)}: access {offering('states')} "
            "and objectives over hidden states, such as hidden_mse, need each other"
        )
    if over_states and len(over_states) == len(terms):
        yield (
            f"with only objectives {', '.join(over_states)} the output layer is not trained; add "
            "forward_kl"
        )
    if bool(over_states) != bool(recipe.outputs.layers):
        yield (
            "outputs.layers names the teacher's layers whose states are matched, as in [2, 4]; "
            f"found {recipe.outputs.layers} with access {access!r}"
        )
    yield from check_rewards(recipe)
    traces = recipe.outputs.traces
    if traces != "all" and recipe.sequences != "teacher":
        yield f"outputs.traces: {traces} selects from what a teacher wrote: use sequences teacher"
    if traces == "none" and ACCESS[access].probabilities:
        yield (
            "outputs.traces: none keeps only the answers, for which there are no distributions of "
            "the teacher: use access text"
        )
    for name, term in terms.items():
        if term.needs != "reward" and term.needs not in reveals and not recipe.control.smoothed:
            yield unrevealed(name, term.needs, access)
    uses = any(term.compares_distributions for term in terms.values())
    if ACCESS[access].probabilities and not uses:
        yield (
            f"objective {', '.join(terms)} never uses the probabilities that access {access!r} "
            "reveals; use access text, or add a divergence"
        )
    if uses and recipe.temperature != 1 and "distribution" not in reveals:
        yield (
            f"temperature other than 1 needs access {offering('distribution')}: access {access} "
            "does not reveal the full distributions"
        )


def unrevealed(name: str, needs: str, access: str) -> str:
    """The problem of an objective that needs more than an access level reveals."""
    if not ACCESS[access].probabilities:
        return (
            f"objective {name} compares distributions, but access {access!r} reveals none; use "
            f"access {offering(needs)}, or objective cross_entropy"
        )
    return f"access {access} cannot serve objective {name}, which needs access {offering(needs)}"


def offering(needs: str) -> str:
    """The levels of access that reveal something."""
    return " or ".join(name for name, access in ACCESS.items() if needs in access.reveals)


def check_rewards(recipe: Recipe) -> Iterator[str]:
    rewarded = learns_from_rewards(recipe)
    needs_rewards = recipe.sequences == "student" and not ACCESS[recipe.access].teacher
    if rewarded != needs_rewards:
        yield (
            "objective policy_gradient, which learns from right/wrong rewards, needs access none "
            f"and sequences student, and the reverse; found access {recipe.access!r}, sequences "
            f"{recipe.sequences!r}, objective {', '.join(recipe.objective)}"
        )
    if rewarded and recipe.student.temperature != 1:
        yield (
            f"student.temperature {recipe.student.temperature:g}: the policy gradient is that of "
            "the policy at temperature 1; remove it"
        )
    if rewarded and len(recipe.objective) > 1:
        yield "objective policy_gradient has its own scale: do not combine it with other objectives"


def check_sequences(recipe: Recipe) -> Iterator[str]:
    """Who writes the training text, and who may score it."""
    access, sequences = recipe.access, recipe.sequences
    if not ACCESS[access].teacher and sequences == "teacher":
        yield "sequences teacher needs access to its text: use access text"
    if ACCESS[access].teacher and not ACCESS[access].probabilities and sequences == "data":
        yield (
            f"access {access} over sequences data is training on the data itself, without the "
            "teacher; use sequences teacher, or access none for a control"
        )
    if recipe.outputs.prompts != "train" and sequences != "teacher":
        yield "invented prompts have no answers in the data: use sequences teacher"
    can_score = ACCESS[access].probabilities and "states" not in ACCESS[access].reveals
    if recipe.writes_itself and not (can_score or learns_from_rewards(recipe)):
        scoring = [n for n, a in ACCESS.items() if a.probabilities and "states" not in a.reveals]
        yield (
            f"access {access!r} cannot score what the student writes: use access "
            f"{', '.join(scoring)}"
        )
    text_only = [name for name in recipe.objective if OBJECTIVES[name].needs == "text"]
    if recipe.writes_itself and text_only:
        yield (
            f"objective {text_only[0]} would teach a student the text that it writes itself: use "
            "only divergences"
        )
    on_policy = recipe.student.on_policy
    if extremes(on_policy)[1] > 1:
        yield f"student.on_policy {on_policy} is a share of the steps, at most 1"
    if sequences == "student" and on_policy:
        yield "with sequences student it writes at all steps: remove student.on_policy"


def check_teachers(recipe: Recipe) -> Iterator[str]:
    several = len(recipe.teachers) > 1
    states = "states" in ACCESS[recipe.access].reveals
    if several and (recipe.sequences != "data" or states):
        yield (
            "several teachers can be averaged only in probabilities over sequences data: their "
            "hidden states differ, and they would write different texts"
        )
    if len(set(recipe.teachers)) != len(recipe.teachers):
        yield f"teachers {recipe.teachers} repeat"


def check_proxy(recipe: Recipe) -> Iterator[str]:
    """A teacher that avoids teaching needs a stand-in for those who learn."""
    outputs = recipe.outputs
    if bool(outputs.antidistillation) != bool(outputs.proxy):
        yield (
            "outputs.antidistillation is how much the teacher avoids what would teach the recipe "
            "outputs.proxy: set both or neither"
        )
    alone = recipe.teachers == ["teacher"] and recipe.sequences == "teacher"
    if outputs.proxy and not (alone and "states" not in ACCESS[recipe.access].reveals):
        yield (
            "outputs.antidistillation changes which tokens the teacher writes: use teachers "
            "[teacher], sequences teacher, and an access without hidden states"
        )


def check_recipe_names(config: Config) -> Iterator[str]:
    """Names are unambiguous, and teachers exist."""
    for name in config.recipes:
        if name in (*CONTROLS, "teacher"):
            yield f"recipes: {name!r} is the name of the teacher or a control; choose another"
    if len(set(config.seeds)) != len(config.seeds):
        yield f"seeds {config.seeds} repeat; every seed is one independent student"
    plan = Plan(config)
    known = (*config.recipes, *plan.teachers)
    for name, recipe in config.recipes.items():
        for teacher in recipe.teachers:
            if teacher not in known:
                yield (
                    f"recipes.{name}.teachers: no teacher {teacher!r}"
                    f"{nearest(teacher, ['teacher', *config.recipes])}; second_teacher must be one "
                    "of controls"
                )
        if recipe.outputs.proxy and recipe.outputs.proxy not in config.recipes:
            yield (
                f"recipes.{name}.outputs.proxy: no recipe {recipe.outputs.proxy!r}"
                f"{nearest(recipe.outputs.proxy, config.recipes)}"
            )
    if circle := {*config.recipes}.difference(*plan.training_order):
        names = [name for name in config.recipes if name in circle]
        yield f"recipes {', '.join(names)} need each other in a circle"


def check_recipe_in_config(config: Config, recipe: Recipe, task: type[Task]) -> Iterator[str]:
    """A recipe with its teacher, its model and its task; each line begins with a key of it."""
    prompt_weight, access = config.students.training.prompt_weight, ACCESS[recipe.access]
    if prompt_weight > 0 and access.probabilities:
        yield (
            f"access: {recipe.access} reveals probabilities for completions only, but "
            f"students.training.prompt_weight is {prompt_weight:g}, expected 0"
        )
    if prompt_weight > 0 and learns_from_rewards(recipe):
        yield (
            "objective: rewards are only for answers, but students.training.prompt_weight is "
            f"{prompt_weight:g}, expected 0"
        )
    invents = recipe.outputs.prompts != "train"
    if invents and not task.invents_prompts:
        yield (
            f"outputs.prompts: task {task.name} cannot use prompts that a teacher invented; use "
            "prompts train"
        )
    fused = [
        model.attention
        for model in (config.model_of(recipe), config.teacher_model_of(recipe))
        if model and model.attention != "eager"
    ]
    if fused and "states" in access.reveals:
        yield (
            f"access: {recipe.access} compares attention maps, which attention {fused[0]} does not "
            "return; use attention eager"
        )
    taught_by_recipe = {*recipe.teachers} & {*config.recipes}
    if invents and (config.teacher.training.prompt_weight == 0 or taught_by_recipe):
        yield (
            "outputs.prompts: a teacher that invents prompts needs "
            "teacher.training.prompt_weight > 0"
        )
    reasons = recipe.outputs.traces != "all" or learns_from_rewards(recipe)
    if reasons and not task.shows_reasoning:
        able = [name for name, other in TASKS.items() if other.shows_reasoning]
        yield (
            "outputs.traces and rewards need a task with reasoning: use task.name "
            f"{' or '.join(able)}"
        )
    yield from check_initial_layers(config, recipe)


def check_initial_layers(config: Config, recipe: Recipe) -> Iterator[str]:
    """A student that starts from layers of its teacher has its sizes, and is not its teacher."""
    layers = recipe.student.initial_layers
    model, taught_by = config.model_of(recipe), config.teacher_model_of(recipe)
    if not layers:
        return
    source = config.recipes.get(recipe.teachers[0])
    count = len(config.seeds)
    if source and min(source.student.seeds or count, count) < min(
        recipe.student.seeds or count, count
    ):
        yield (
            f"student.initial_layers: every student starts from one of {recipe.teachers[0]!r} with "
            "the same seed, which has fewer; give it as many student.seeds"
        )
    deep = taught_by.num_hidden_layers or 0
    all_of_it = layers == [*range(1, deep + 1)] and model.num_hidden_layers == deep
    if all_of_it and recipe.writes_itself and ACCESS[recipe.access].teacher:
        yield (
            "student.initial_layers: with all layers of its teacher the student writes what the "
            "teacher would, and is scored by itself; take fewer layers, or start from random "
            "weights"
        )
    ignored = {"num_hidden_layers", "initializer_range"}
    if model.model_dump(exclude=ignored) != taught_by.model_dump(exclude=ignored):
        yield (
            "student.initial_layers: layers can be copied only if the student's model has the "
            "teacher's sizes, except num_hidden_layers"
        )


def check_controls(config: Config) -> Iterator[str]:
    first = next(iter(config.recipes.values()))
    if "smoothed" in config.controls and Plan(config).softest is None:
        yield (
            "the control smoothed uses the entropy of stored distributions: it needs a recipe "
            f"with access {offering('distribution')}, and not sequences student"
        )
    if "shuffled" in config.controls and not ACCESS[first.access].teacher:
        yield "the control shuffled permutes the first recipe's outputs, but it has none"
    if "shuffled" in config.controls and first.writes_itself:
        yield (
            "the control shuffled permutes stored outputs, but students of the first recipe write "
            "their own text; put another recipe first"
        )
    answered = Plan(config).request(first) and first.outputs.prompts == "train"
    if "gold" in config.controls and not (answered and first.teachers == ["teacher"]):
        yield (
            "the control gold trains on the data's answers for the rows that the first recipe's "
            "teacher answers: the first recipe needs stored outputs with prompts train, of teacher"
        )
    extra = [name for name in config.controls if name in TEACHERS]
    if extra and config.teacher.epochs == 0:
        yield f"the control {extra[0]} is trained from another seed: remove it"


def check_tuning(config: Config) -> Iterator[str]:
    """Every recipe and control is tuned alike, on students that are not judged."""
    tune, tuned, plan = config.tune, config.tuned, Plan(config)
    if tune is None:
        if tuned:
            yield "tuned: there is no section tune; remove tuned"
        return
    if tune.seed in config.seeds:
        yield f"tune.seed {tune.seed} is one of seeds, whose students are judged; choose another"
    for key, rates in {"learning_rate": tune.learning_rate, **tune.other_rates}.items():
        if len(set(rates)) < len(rates) or (len(rates) == 1 and len(tune.transfer_rows) > 1):
            yield f"tune: the rates of {key} are {rates}, expected different ones, two or more"
    for name, rates in tune.other_rates.items():
        if name not in plan.recipes:
            yield f"tune.other_rates: no recipe or control {name!r}{nearest(name, plan.recipes)}"
        elif len(rates) != len(tune.learning_rate):
            yield (
                f"tune.other_rates.{name}: found {len(rates)} rates, expected as many as in "
                f"learning_rate, {len(tune.learning_rate)}"
            )
    missing = [name for name in plan.recipes if tuned and name not in tuned.tries]
    if missing:
        yield (
            f"tuned: {', '.join(missing)} was not tuned; tune again with train.py CONFIG --tune, "
            "or remove tune and tuned"
        )
    if tuned and tuned_for(config):  # otherwise the result says that it was tuned for another one
        yield from check_tries(config, plan)


def check_tries(config: Config, plan: Plan) -> Iterator[str]:
    """Those that `tune` asks for, best first."""
    metrics = metrics_of(TASKS[config.task.name])
    for name, recipe in plan.recipes.items():
        tries = config.tuned.tries[name]
        if name not in config.recipes:  # its rows are those of the first recipe
            wanted = [one.learning_rate for one in tries_of(config, name, recipe)]
            found = [one.learning_rate for one in tries]
        else:
            asked = tries_of(config, name, untuned(config, name, recipe))
            wanted, found = (
                [(one.learning_rate, one.transfer_rows or 0) for one in some]
                for some in (asked, tries)
            )
        ranks = [rank(one, config.tuned.metric, metrics) for one in tries]
        if sorted(wanted) != sorted(found) or ranks != sorted(ranks):
            yield (
                f"tuned.tries.{name} are not those that tune asks for, best first; tune again with "
                "train.py CONFIG --tune"
            )


def check_published(config: Config) -> Iterator[str]:
    """A pretrained teacher may be imitated."""
    published = config.teacher.published
    if published is None:
        return
    if config.teacher.epochs or not (config.teacher.model and config.teacher.model.pretrained):
        yield (
            "teacher.published is what others state of a pretrained teacher that stays unchanged; "
            "remove it, or set teacher.model.pretrained and epochs 0"
        )
    if published.allows_distillation == "no" and not published.permission:
        yield (
            f"teacher.published: licence {published.licence!r} does not allow that a model is "
            "trained on its outputs; choose another teacher, or say in "
            "teacher.published.permission who allowed it"
        )


def check_budget(config: Config) -> Iterator[str]:
    """A student's budget is set once, in a unit that fits the teacher."""
    pretrained = config.teacher.epochs == 0
    if pretrained != bool(config.students.tflops):
        yield (
            "teacher.epochs 0, its default, keeps a teacher unchanged, so the students' budget "
            "must be students.tflops, not a fraction of its training; set both or neither"
        )
    if (config.students.budget is None) == (config.students.tflops is None):
        yield "students: set one of budget and tflops, the cost they are allowed"
    if pretrained and config.teacher.model and not config.teacher.model.pretrained:
        yield "teacher.epochs 0 needs teacher.model.pretrained: the teacher would be untrained"
    learners = {"students.model": config.students.model} | {
        f"recipes.{name}.student.model": recipe.student.model
        for name, recipe in config.recipes.items()
        if recipe.student.model
    }
    if not pretrained and config.teacher.model:
        learners["teacher.model"] = config.teacher.model
    for key, model in learners.items():
        if model.dtype:
            yield (
                f"{key}.dtype: found {model.dtype}, but weights that learn stay in "
                "config.precision; remove it, and set training.autocast"
            )
