"""The plan: a config resolved once into stages, their order, prerequisites and budgets."""

from dataclasses import dataclass
from functools import cached_property

from configs.schema import Config, Recipe
from student.recipe import control_recipe, uses_relations
from teacher.access import ACCESS, needs_outputs
from teacher.outputs import OutputsRequest

TEACHERS = ("teacher", "second_teacher")


def needed_by(recipe: Recipe) -> list[str]:
    """The recipes and teachers that are trained before: those that teach, and a proxy."""
    return [*recipe.teachers, *filter(None, [recipe.outputs.proxy])]


@dataclass(frozen=True)
class Plan:
    """The stages of an experiment. A stage is a folder of the run: `teacher`, `second_teacher`,
    `outputs/...` or `students/NAME/seed-N`."""

    config: Config

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of all students and of all controls that are students, by name. Controls
        are derived from the first recipe; a second teacher is not a student."""
        controls = {
            name: self.tuned(name, control_recipe(name, self.first))
            for name in self.config.controls
            if name not in TEACHERS
        }
        return {**self.config.recipes, **controls}

    @property
    def first(self) -> Recipe:
        return next(iter(self.config.recipes.values()))

    def tuned(self, control: str, recipe: Recipe) -> Recipe:
        """A control with its own tuned learning rate; its rows are those of the first recipe."""
        best = self.config.best_try(control)
        if best is None:
            return recipe
        student = recipe.student.model_copy(update={"learning_rate": best.learning_rate})
        return recipe.model_copy(update={"student": student})

    @property
    def teachers(self) -> dict[str, int]:
        """{stage: seed} of the teachers that are trained."""
        seed = self.config.teacher.seed
        return {
            name: seed + number
            for number, name in enumerate(TEACHERS)
            if name == "teacher" or name in self.config.controls
        }

    @cached_property
    def training_order(self) -> list[list[str]]:
        """Names of students and controls in groups; a student that others need is in an earlier
        group. Controls come last, because some need outputs of a recipe. Recipes that teach each
        other in a circle are in no group."""
        waiting, trained = dict(self.config.recipes), set(TEACHERS)
        groups: list[list[str]] = []
        while ready := [n for n, r in waiting.items() if trained.issuperset(needed_by(r))]:
            groups.append(ready)
            trained.update(ready)
            for name in ready:
                del waiting[name]
        if groups:
            groups[-1] += [name for name in self.recipes if name not in self.config.recipes]
        return groups

    def seeds_of(self, name: str) -> list[int]:
        """The seeds of a student or control; a teacher is one model."""
        return [0] if name in TEACHERS else self.config.seeds[: self.recipes[name].student.seeds]

    def is_taught(self, name: str) -> bool:
        """Whether a student has learned anything from a teacher, if only through another model."""
        recipe = self.recipes[name]
        return ACCESS[recipe.access].teacher or bool(recipe.student.initial_layers)

    def students(self, names: list[str]) -> dict[str, tuple[str, int]]:
        """{stage: (name, seed)} of the students of these recipes and controls, seed by seed."""
        return {
            self.stage(name, seed): (name, seed)
            for seed in self.config.seeds
            for name in names
            if seed in self.seeds_of(name)
        }

    @property
    def evaluated(self) -> list[str]:
        """Every student and control, in the order of the config."""
        return [*self.recipes, *(name for name in self.teachers if name != "teacher")]

    def stage(self, name: str, seed: int | None = None) -> str:
        """The stage of a model; without a seed, of a recipe's first seed."""
        if name in TEACHERS:
            return name
        return f"students/{name}/seed-{self.config.seeds[0] if seed is None else seed}"

    def request(self, recipe: Recipe) -> OutputsRequest | None:
        """The outputs that a recipe needs, if any."""
        return OutputsRequest.of(recipe, uses_relations(recipe)) if needs_outputs(recipe) else None

    def requests(self, names: list[str] | None = None) -> dict[str, Recipe]:
        """{stage of outputs: a recipe that needs them} of these students, or of all."""
        found = {}
        for name in names or self.recipes:
            request = self.request(self.recipes[name])
            if request:
                found.setdefault(request.stage, self.recipes[name])
        return found

    def prerequisites(self, recipe: Recipe, *, uncharged: bool = False) -> list[str]:
        """The stages that a student of this recipe is charged for before it trains: its outputs
        (those with `charged: false` only if `uncharged`), and an assistant that teaches it or gives
        it its layers. The teacher itself is not charged."""
        request = self.request(self.first if recipe.control.gold else recipe)
        pays = recipe.outputs.charged or uncharged
        stages = [request.stage] if request and pays else []
        for name in recipe.teachers:
            learns = ACCESS[recipe.access].teacher or recipe.student.initial_layers
            if name in self.config.recipes and learns:
                stages.append(self.stage(name))
                stages += self.prerequisites(self.config.recipes[name], uncharged=True)
        return list(dict.fromkeys(stages))

    @property
    def softest(self) -> Recipe | None:
        """The first recipe whose stored outputs give the entropy of the teacher."""
        for recipe in self.config.recipes.values():
            if "distribution" in ACCESS[recipe.access].reveals and needs_outputs(recipe):
                return recipe
        return None
