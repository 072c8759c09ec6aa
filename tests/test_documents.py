"""Every number in the prose of the README and of docs/ is one that the project measures or sets."""

import json
import math
import re
import tomllib

import pytest

from configs.schema import Published
from experiment.check import EXIT_CODES, MEANINGS, TRACE_TOLERANCE
from experiment.reading import read_config
from measure.reasoning import VOTES
from measure.report.documents import pages
from measure.statistics import LEVEL
from models.language import LARGE_VOCABULARY
from student.objectives import OBJECTIVES
from student.recipe import ANSWERS, FROM_TEXT, control_recipe
from tasks import TASKS, load_task
from tasks.examples import GRAM, MOST_MALFORMED
from tasks.pronounce import LONG, SPLITS, split_of
from teacher.access import ACCESS
from teacher.api import __main__ as seller
from teacher.api.traffic import ATTACKS
from tests.helpers import ROOT

# By commands of the project; in `reported`, by others, with their sources.
WRITTEN_BY_COMMANDS = re.compile(r"<!-- \S+ -->.*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
NO_QUANTITY = re.compile(
    r"\b(?:19|20)\d\d\b"  # a year
    r"|\w*[A-Za-z_]\w*\d\w*|T\^2"  # a name: float64, T^2
    r"|^\d\. |\| \d \|$",  # an item of a list; an exit code, for which see below
    re.MULTILINE,
)
OF_NO_RUN = (  # what no file of the project can confirm
    "for a GPU with 24 GB",
    "(rows - 1)",
    "n - 1 degrees of freedom",
    "is above 0 for a perfectly calibrated model",
)


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def config(name: str):
    return read_config(ROOT / "configs" / f"{name}.yaml")


def of_setup_and_cost() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = result("quickstart")
    stages, workers = found["cost"]["stages"], found["config"]["workers"]
    work = sum(stage["seconds"] for stage in stages if stage["stage"] != "tuning") / 60
    gigabytes = workers * max(stage["peak_memory_mb"] for stage in stages) / 1000
    assert work < 4  # the rest is the set-up
    cores = found["environment"]["trained"]["cores"]
    costs = found["cost"]["fraction_of_teacher_by_student"]
    flops, seconds = (
        [100 * costs[name][key] for name in found["students"]] for key in ("flops", "seconds")
    )
    assert len({round(share, 1) for share in flops}) == 1
    return [
        f"With Python {project['requires-python'].removeprefix('>=')} or newer",
        f"5 minutes on {cores} cores with the set-up, below {math.ceil(gigabytes)} GB of memory",
        f"is {flops[0]:.0f} % of the teacher's training FLOPs",
        f"it took {min(seconds):.0f} to {max(seconds):.0f} % of the seconds",
    ]


def of_words() -> list[str]:
    task = load_task(config("quickstart").task)
    count = sum(len(task.rows(split)) for split in SPLITS)
    drawn = [split_of(f"{number:x}") for number in range(50_000)]
    shares = [round(100 * drawn.count(split) / len(drawn)) for split in SPLITS]
    labels = control_recipe("low_data", FROM_TEXT).control.label_fraction
    return [
        f"{round(count, -3):,} real words",
        "{} % train, {} % validation (for all choices), {} % held-out".format(*shares),
        f"words of {LONG} letters or more",
        f"{100 * labels:.0f} % of those words",
    ]


def of_rules() -> list[str]:
    return [
        f"to {TRACE_TOLERANCE:.0e}".replace("e-0", "e-"),
        f"{VOTES[0]} to {VOTES[-1]} votes",
        f"The {100 * (1 - LEVEL):.0f} % interval",
        f"Coverage of the nominal {100 * (1 - LEVEL):.0f} %",
        f"significant at {100 * LEVEL:.0f} %",
    ]


def of_configs() -> list[str]:
    digits, text, steps = config("digits"), config("text"), TASKS["reason"].steps
    *cooler, hottest = sorted(recipe.temperature for recipe in digits.recipes.values())
    task = load_task(digits.task)
    count = sum(len(task.rows(split)) for split in ("train", "validation", "heldout"))
    found = result("digits")
    share = found["students"]["t4"]["params"] / found["teacher"]["params"]
    assert 0.08 < share < 0.12
    most = text.recipes["top_k"].outputs.k
    trained, longer = steps["heldout"], steps["long"]
    return [
        f"{count:,} digits of MNIST",
        f"a tenth of its size, temperatures {', '.join(f'{t:g}' for t in cooler)} and {hottest:g}",
        f"the {most} most likely tokens",
        f"problems of {trained[0]} to {trained[-1]} steps, and of {longer[0]} to {longer[-1]}",
    ]


def of_own_models() -> list[str]:
    published = Published(source="a", parameters=2.0, tokens=3.0)
    assert MOST_MALFORMED == 1 / 100  # "one in a hundred"
    return [
        f"{published.flops / 2 / 3:g} FLOPs per parameter and token",
        f"From {LARGE_VOCABULARY:,} outcomes on",
        f"held-out {GRAM}-grams",
        f"evaluation splits too, at temperature {ANSWERS.outputs.temperature:g}",
    ]


def of_api() -> list[str]:
    options = seller.parser().parse_args(["traffic", "runs/text"])
    assert (options.days, len(ATTACKS)) == (5, 5)
    bought = [recipe.outputs.transfer_rows for recipe in config("extract").recipes.values()]
    return [f"five days of {options.customers} customers", f"its {sum(bought):,} questions"]


@pytest.fixture(scope="module")
def prose() -> str:
    """All pages but code, what commands write and what is no quantity, on one line."""
    texts = (page.read_text(encoding="utf-8") for page in pages(ROOT) if page.stem != GENERATED)
    written = CODE.sub("", WRITTEN_BY_COMMANDS.sub("", "\n".join(texts)))
    return " ".join(NO_QUANTITY.sub(" ", written).split())


GENERATED = "architectures"


def test_every_number_in_the_prose_is_confirmed_by_the_project(prose):
    confirmed = [
        *of_setup_and_cost(), *of_words(), *of_rules(), *of_configs(), *of_api(), *of_own_models(),
    ]  # fmt: skip
    missing = [text for text in confirmed if text not in prose]
    assert not missing
    for text in (*confirmed, *OF_NO_RUN):
        prose = prose.replace(text, "")
    sentences = re.split(r"(?<=[.:;!?]) ", prose)
    assert [sentence for sentence in sentences if re.search(r"\d", sentence)] == []


def test_the_exit_codes_of_a_check_are_those_that_it_returns():
    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-D?]) \|.*\| (\d) \|$", page, re.MULTILINE)
    assert {tier: int(code) for tier, code in rows} == {t: EXIT_CODES.get(t, 0) for t in MEANINGS}


def test_what_is_said_of_no_run_is_still_said(prose):
    assert [text for text in OF_NO_RUN if text not in prose] == []


def test_what_the_readme_concludes_is_what_the_committed_runs_show():
    ahead = {
        (verdict["claim"], verdict["metric"]): verdict["committed"]["ahead"]
        for verdict in result("quickstart")["verdicts"]
    }
    metrics = ("word_error_rate", "sequence_agreement", "kl_teacher_student", "ece")
    against = {
        name: [ahead[f"{name} beats baseline", metric] for metric in metrics]
        for name in ("text", "logits", "hidden")
    }
    assert ahead["text beats low_data", "word_error_rate"] == 10
    assert ahead["text beats gold", "word_error_rate"] == 10
    assert max(against["text"][0], *against["text"][2:]) <= 2  # mostly or always behind
    assert against["logits"][1] == 10
    assert all(0 < count < 10 for count in (against["logits"][0], *against["logits"][2:]))
    assert against["hidden"] == [10] * 4


def test_what_is_concluded_from_pronounce_is_what_its_claims_show():
    found = {(v["claim"], v["metric"]): v["result"] for v in result("pronounce")["verdicts"]}
    errors, agreement, kl = "word_error_rate", "sequence_agreement", "kl_teacher_student"
    undecided = "not distinguished"
    assert {found[f"{name} beats low_data", errors] for name in ("text", "logits", "hidden")} == {
        "better"
    }
    assert found["text beats baseline", errors] == undecided
    assert found["logits beats baseline", agreement] == "better"
    assert {found["hidden beats baseline", m] for m in (errors, agreement, kl)} == {"better"}
    assert {found[f"{n} beats baseline", "ece"] for n in ("text", "logits", "hidden")} == {"worse"}
    assert {found["text beats gold", m] for m in (errors, agreement)} == {"better"}
    assert (
        found["sharp beats logits", errors] == found["sharp beats logits", agreement] == undecided
    )
    assert found["sharp beats logits", kl] == found["sharp beats logits", "ece"] == "worse"
    gaps, teacher = result("pronounce")["gaps"], result("pronounce")["teacher"]["quality"]
    closed = {name: gaps[name]["low_data_to_teacher"]["share"] for name in gaps}
    assert closed["text"] > 0.60
    assert closed["logits"] > 0.65
    assert closed["hidden"] < 0.85
    assert teacher["phoneme_error_rate"]["mean"] < 0.08 < 0.30 < teacher["word_error_rate"]["mean"]


def test_what_is_concluded_from_savings_is_what_its_intervals_show():
    def ends(metric, kind, budget):
        return result("savings")["savings"]["needs"][metric][f"baseline_{budget}"][kind]

    def interval(metric, kind, budget):
        return ends(metric, kind, budget)["flops"]["ci95"]

    words, between = "word_error_rate", (4, 8, 16)
    assert all(ends(words, kind, 32) == "more" for kind in ("text", "logits", "hidden"))
    assert all(interval(words, "hidden", budget)[1] < 1 for budget in between)
    assert interval(words, "hidden", 2)[0] <= 1 <= interval(words, "hidden", 2)[1]
    for kind in ("text", "logits"):
        assert interval(words, kind, 2)[0] > 1
        assert all(interval(words, kind, budget)[1] > 1 for budget in between)
        assert interval("sequence_agreement", kind, 32)[1] < 1
        answered = [name for name in result("savings")["savings"]["labels"] if kind in name]
        assert {result("savings")["savings"]["labels"][name] for name in answered} == {0}


def test_what_is_concluded_from_methods_is_what_its_claims_show():
    claims = [v for v in result("methods")["verdicts"] if v["metric"] == "sequence_agreement"]
    found = {v["claim"]: v["result"] for v in claims}

    def of(name):
        return [found.get(f"{name} beats {other}") for other in ("baseline", "forward_kl")]

    names = {claim.split()[0] for claim in found} - {"shuffled", "forward_kl"}
    assert [name for name in names if of(name) == ["better", "better"]] == ["states"]
    assert found["text beats forward_kl"] == "better"
    for name in (
        "answers",
        "sharp_answers",
        "cold",
        "warm",
        "top_5",
        "top_1",
        "sampled_12",
        "invented",
    ):
        assert of(name) == ["not distinguished"] * 2
    for name in ("hot", "two_teachers"):
        assert found[f"{name} beats baseline"] == "worse"
    recipes = config("methods").recipes
    other = [n for n, r in recipes.items() if {*r.objective} - {"forward_kl", "cross_entropy"}]
    for name in {*other, "on_policy", "mixed", "assisted", "born_again", "first_layer"} - {
        "states"
    }:
        assert found[f"{name} beats baseline"] == "worse"


def test_what_is_concluded_from_scaling_is_what_its_students_and_laws_show():
    found = result("scaling")
    kl = {n: e["fidelity"]["kl_teacher_student"] for n, e in found["students"].items()}
    most = kl["words_100k"]["mean"]
    assert min(kl["words_300k"]["mean"], kl["words_1m"]["mean"]) > most
    assert kl["words_30k"]["ci95"][0] <= most <= kl["words_30k"]["ci95"][1]
    assert kl["words_10k"]["ci95"][0] > most
    rows, size = found["laws"]["rows"], found["laws"]["size"]
    constant = rows["law_ci95"][2]
    assert constant[0] < most < constant[1]
    assert set(rows["x"]) == {"words_1k", "words_3k", "words_10k", "words_30k", "words_100k"}
    assert size["identified"]
    assert size["minimum_ci95"][1] < size["x"]["size_8th"]
    scaling = config("scaling")
    shapes = map(scaling.model_of, scaling.recipes.values())
    assert {model.num_hidden_layers for model in shapes} == {2}


def test_what_is_concluded_from_digits_is_what_its_claims_show():
    found = {(v["claim"], v["metric"]): v for v in result("digits")["verdicts"]}
    for claim in ("t4 beats t1", "t20 beats t1", "t4 beats baseline"):
        assert found[claim, "kl_teacher_student"]["result"] == "better"
    errors = found["t4 beats baseline", "error_rate"]
    assert errors["result"] == "not distinguished"
    assert round(100 * errors["difference"], 1) == 0.5


def test_what_is_concluded_from_reason_is_what_its_claims_show():
    found = result("reason")
    claims = {v["claim"]: v for v in found["verdicts"]}
    traces = claims["traces beats answers"]
    assert (traces["metric"], traces["threshold"], traces["seeds"]) == ("accuracy_4_5", 0.3, 10)
    assert traces["result"] == "not distinguished"
    assert abs(traces["difference"] - 1 / 3) < 0.02
    assert traces["ci95"][0] > 0.2
    for control in ("baseline", "low_data"):
        assert claims[f"traces beats {control}"]["result"] == "not distinguished"
        assert found["controls"][control]["quality"]["accuracy"]["mean"] > 0.99
    assert claims["traces_low beats answers_low"]["result"] == "not distinguished"
    models = {**found["students"], **found["controls"], "teacher": found["teacher"]}
    longer = {
        name: model["long"]["quality"]["accuracy_6"]["mean"] for name, model in models.items()
    }
    assert max(longer, key=longer.get) == "answers"
    assert longer["answers"] < 0.5


def test_what_is_concluded_from_text_is_what_its_claims_show():
    found = {(v["claim"], v["metric"]): v["result"] for v in result("text")["verdicts"]}
    loss, undecided = "bits_per_byte", "not distinguished"
    assert found["top_k beats text", loss] == found["logits beats top_k", loss] == "better"
    assert found["text beats low_data", loss] == found["text beats shuffled", loss] == undecided
    assert found["text beats baseline", loss] == "worse"
    assert found["logits beats baseline", "kl_teacher_student"] == "better"
    assert (
        found["logits beats baseline", loss] == found["logits beats baseline", "ece"] == undecided
    )


NOT_OURS = {"command not found", "No module named 'numpy'", "nan", "inf"}


def test_every_message_in_troubleshooting_is_one_that_the_project_prints():
    """Their wording may change: then the page must."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = {
        message
        for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
        for message in re.findall(r"`([^`]*)`", row)
    }
    assert len(quoted) > 15
    files = [ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    code = "".join(re.sub(r'"\s*f?"', "", file.read_text(encoding="utf-8")) for file in files)
    assert [message for message in sorted(quoted - NOT_OURS) if message not in code] == []


def test_every_objective_and_every_level_of_access_has_a_row_in_methods():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` (.*)\|$", page, re.MULTILINE)
    assert {name for name, _ in rows if name in OBJECTIVES} == set(OBJECTIVES)
    shown = {name for name in ACCESS if f"`{name}`" in page or f"access: {name}" in page}
    assert shown == set(ACCESS)
    recipes = config("methods").recipes
    tables = re.findall(r"<!-- column/methods\.json -->(.*?)<!-- end -->", page, re.DOTALL)
    cells = [line.split("|")[-3] for table in tables for line in table.strip().splitlines()]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} - {*OBJECTIVES}
    assert named <= set(recipes) | {"forward_kl", "cross_entropy"}
    shown = named | {"forward_kl", "reverse_kl", "adaptive_kl", "total_variation", "text"}
    assert shown | {"skewed_reverse_kl"} >= set(recipes) - {"answers", "sharp_answers", "assistant"}
    assert "grpo" in config("rewards").recipes
