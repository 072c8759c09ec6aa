"""The plan: the names of stages, and what a student is charged for before it trains."""

from configs.schema import Recipe
from experiment.plan import Plan
from experiment.reading import read_config
from tests.helpers import METHODS, TINY

ASSISTANT = ["students/assistant/seed-0", "outputs/data-logits"]


def test_a_student_is_charged_for_an_assistant_that_teaches_it_or_gives_it_its_layers():
    plan = Plan(read_config(TINY, METHODS))
    assisted = plan.recipes["assisted"]
    assert plan.prerequisites(assisted) == ["outputs/assistant-data-sampled-6", *ASSISTANT]
    alone = {"access": "none", "objective": "cross_entropy", "teachers": ["assistant"]}
    assert plan.prerequisites(Recipe(**alone)) == []
    assert plan.prerequisites(Recipe(**alone, student={"initial_layers": [1]})) == ASSISTANT


def test_outputs_that_are_not_charged_are_prerequisites_only_where_everything_counts():
    plan = Plan(read_config(TINY, ["recipes.distilled.outputs.charged=false"]))
    free = plan.recipes["distilled"]
    assert plan.prerequisites(free) == []
    assert plan.prerequisites(free, uncharged=True) == ["outputs/data-logits"]
    plan = Plan(read_config(TINY, [*METHODS, "recipes.assistant.outputs.charged=false"]))
    assert plan.prerequisites(plan.recipes["assisted"])[1:] == ASSISTANT  # others pay for it


def test_without_a_seed_the_stage_of_a_student_is_that_of_its_first_seed():
    plan = Plan(read_config(TINY, ["seeds=[3, 1]"]))
    assert plan.stage("distilled") == "students/distilled/seed-3"
    assert plan.stage("distilled", 1) == "students/distilled/seed-1"
    assert plan.stage("second_teacher", 1) == "second_teacher"


def test_a_recipe_may_have_fewer_seeds():
    plan = Plan(read_config(TINY, ["seeds=[4, 2, 7]", "recipes.top.student.seeds=2"]))
    assert plan.seeds_of("top") == [4, 2]
    assert plan.seeds_of("teacher") == [0]
    assert plan.seeds_of("baseline") == [4, 2, 7]
    assert plan.students(["top", "baseline"]) == {
        "students/top/seed-4": ("top", 4),
        "students/baseline/seed-4": ("baseline", 4),
        "students/top/seed-2": ("top", 2),
        "students/baseline/seed-2": ("baseline", 2),
        "students/baseline/seed-7": ("baseline", 7),
    }


def test_gold_is_the_first_recipe_with_the_datas_answers_and_its_cost():
    first = "recipes.distilled."
    changes = [f"{first}student.budget_fraction=0.5", f"{first}outputs.transfer_rows=100"]
    plan = Plan(read_config(TINY, [*changes, "controls=[gold]", "verdicts=[]"]))
    gold, distilled = plan.recipes["gold"], plan.recipes["distilled"]
    assert gold.control.gold
    assert (gold.access, gold.sequences) == ("none", "data")
    assert gold.outputs.transfer_rows == 100
    assert gold.student.budget_fraction == 0.5
    assert plan.prerequisites(gold) == plan.prerequisites(distilled)
    assert plan.request(gold) is None


def test_the_softest_recipe_is_the_first_that_stores_distributions():
    plan = Plan(read_config(TINY))
    assert plan.softest is plan.recipes["distilled"]
    only = ["recipes={text: {access: text, sequences: teacher, objective: cross_entropy}}"]
    without = Plan(read_config(TINY, [*only, "controls=[baseline]", "verdicts=[]"]))
    assert without.softest is None
