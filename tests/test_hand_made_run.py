"""A run made by hand, with models whose logits are known: every figure of eval.json, the table,
the sentences and the report is recomputed here, in plain Python."""

import json
import math
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as judge
import tasks
from configs.schema import Config
from experiment.command import command_line
from experiment.experiment import data_of, open_experiment, splits_of
from experiment.plan import Plan
from experiment.run import Run
from experiment.stages import made_of
from measure.report.console import print_result
from measure.report.documents import markdown
from measure.report.page import with_whole_numbers
from measure.report.sentences import facts_of
from measure.report.tables import claims_table
from models.classifier import MlpClassifier, MlpConfig
from models.language import save_model
from models.rows import Rows
from tasks.task import Metric, Task

LABELS, SEEDS = 4, [3, 8, 1, 4, 6]
SIZES = {"train": 12, "validation": 10, "heldout": 40, "far": 30}
FIRST = {"train": 0, "validation": 12, "heldout": 22, "far": 62}  # pixel of each split's first row
PIXELS = 92


class Cards(Task):
    """Row i lights pixel i alone, so a linear model can give it any logits."""

    name = "cards"
    item_noun = "cards"
    examples = ("22",)
    evaluation_splits = ("heldout", "far")
    metrics = {"error_rate": Metric("errors", "%", True, "wrong", final_answer=True)}
    headline = "error_rate"
    table = ("error_rate", "sequence_agreement", "kl_teacher_student", "ece")
    longest_answer = 1
    longest_row = PIXELS + 1
    vocabulary, input_vocabulary, pad, end = LABELS, 256, 0, -1

    def rows(self, split):
        pixels = range(FIRST[split], FIRST[split] + SIZES[split])
        prompts = [[255 * (p == pixel) for p in range(PIXELS)] for pixel in pixels]
        return Rows.build(list(pixels), prompts, [[label_of(pixel)] for pixel in pixels])

    def prompt(self, question):
        return [255 * (p == int(question)) for p in range(PIXELS)]

    def question(self, rows, i):
        return str(int(rows.ids[i]))

    def truths(self, question):
        return [str(label_of(int(question)))]

    def token_name(self, token):
        return str(int(token))

    def render(self, tokens):
        return "".join(str(int(token)) for token in tokens[:1])

    def grade(self, ids, answers):
        wrong = [answer != str(label_of(int(i))) for i, answer in zip(ids, answers, strict=True)]
        return {"wrong": np.array(wrong, float)}


def label_of(pixel: int) -> int:
    return pixel * 7 % LABELS


MODEL = {"architecture": "mlp", "hidden_size": PIXELS, "num_hidden_layers": 1}
SIDE = {"model": MODEL, "training": {"batch_rows": 4}}
CONFIG = {
    "name": "cards",
    "task": {"name": "cards"},
    "seeds": SEEDS,
    "threads": 1,
    "teacher": {**SIDE, "epochs": 1},
    "students": {**SIDE, "budget": 0.5},
    "recipes": {"good": {"access": "logits"}, "poor": {"access": "logits", "temperature": 2}},
    "controls": ["baseline", "low_data"],
    "verdicts": [
        {"claim": "good beats poor", "metric": "error_rate"},
        {"claim": "poor beats good", "metric": "error_rate"},
        {"claim": "good beats poor", "metric": "error_rate", "threshold": 0.9},
        {"claim": "good beats poor", "metric": "kl_teacher_student"},
        {"claim": "good beats poor", "metric": "sequence_agreement", "split": "far"},
        {"claim": "good matches good", "metric": "error_rate", "threshold": 0.02},
        {"claim": "poor matches good", "metric": "error_rate", "threshold": 0.02},
        {"claim": "good matches poor", "metric": "error_rate", "threshold": 0.02},
        {"claim": "good keeps teacher", "metric": "sequence_agreement", "threshold": 0.3},
    ],
    "cost": {"price_per_hour": 3.6, "currency": "EUR"},
}
# How sure each model is of the right label, and how noisy.
QUALITY = {"teacher": 2.5, "good": 2.0, "poor": 0.3, "baseline": 1.2, "low_data": 0.6}


def logits_of(name: str, seed: int) -> np.ndarray:
    """[PIXELS, LABELS]; students resemble the teacher."""
    draw = np.random.Generator(np.random.PCG64([sum(map(ord, name)), seed]))
    right = np.eye(LABELS)[[label_of(pixel) for pixel in range(PIXELS)]]
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal((PIXELS, LABELS))
    own = draw.standard_normal((PIXELS, LABELS))
    mix = noise if name == "teacher" else 0.7 * noise + 0.5 * own
    return (QUALITY[name] * right + mix).astype(np.float32)


def model_of(logits: np.ndarray) -> MlpClassifier:
    """hidden = pixels; logits = a row of the table."""
    config = MlpConfig(pixels=PIXELS, hidden_size=PIXELS, num_hidden_layers=1, num_labels=LABELS)
    model = MlpClassifier(config)
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.eye(PIXELS))
        model.layers[0].bias.zero_()
        model.head.weight.copy_(torch.from_numpy(logits).T)
        model.head.bias.zero_()
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run, evaluated by the real script."""
    tasks.TASKS["cards"] = Cards
    config = Config.model_validate(CONFIG)
    run = Run.open(tmp_path_factory.mktemp("figures") / "cards", config, ENVIRONMENT)
    experiment = open_experiment(config, run)
    run.manifest |= {"data": data_of(experiment), "splits": splits_of(experiment)}
    plan, tables = Plan(config), {}
    for number, (stage, name, seed) in enumerate(stages(plan)):
        if name == "outputs":
            (run.folder / stage).mkdir(parents=True)
            made = {"sha256": "0" * 64, "rows": 12, "different": 12}
        else:
            tables[name, seed] = logits_of(name, seed)
            model = model_of(tables[name, seed])
            save_model(model, None, run.folder / stage, "a card")
            run.log(stage, step=1, loss=1.0, validation_nll=0.9, flops=1e11)
            run.log(stage, step=5, loss=0.5, validation_nll=0.6, flops=5e11)
            made = made_of(run.folder / stage, model)
        run.record_stage(stage, cost_of(number), made)
    run.close()
    assert judge.main([str(run.folder)]) == 0
    result = json.loads((run.folder / "eval.json").read_text("utf-8"))
    report = (run.folder / "report.html").read_text("utf-8")
    yield SimpleNamespace(run=run, tables=tables, result=result, report=report, plan=plan)
    del tasks.TASKS["cards"]


ENVIRONMENT = {
    "python": "3", "packages": {"torch": "2"}, "platform": "here", "cpu": "one", "cores": 2,
    "cpu_capability": "AVX2", "gpu": None, "threads": 1, "workers": 1, "processes": 1,
    "code": "c0de", "commit": None, "dirty": False, "command": "by hand",
}  # fmt: skip


def stages(plan: Plan) -> list[tuple[str, str, int]]:
    students = [(plan.stage(n, seed), n, seed) for n in plan.recipes for seed in SEEDS]
    return [("teacher", "teacher", 0), ("outputs/data-logits", "outputs", 0), *students]


def cost_of(number: int) -> dict:
    """Of the stage with this number: all different."""
    seconds = 100.0 + 7 * number
    return {
        "flops": 1e12 * (100 if number == 0 else 10 + number), "seconds": seconds,
        "joules": 50.0 + number, "joules_source": "by hand", "money": seconds / 1000,
        "currency": "EUR", "peak_memory_mb": 300 + number, "steps": 5 + number, "rows": 12,
        "bytes_per_token": 8.0,
    }  # fmt: skip


# -- the same figures, from the logits alone -------------------------------------------------------


def softmax(logits) -> list[float]:
    largest = max(map(float, logits))
    weights = [math.exp(float(value) - largest) for value in logits]
    return [weight / sum(weights) for weight in weights]


def expected(made, name: str, seed: int, split: str) -> dict[str, float]:
    """Every metric of one model on one split."""
    pixels = range(FIRST[split], FIRST[split] + SIZES[split])
    ours, theirs = made.tables[name, seed], made.tables["teacher", 0]
    wrong, same, copied, errors, kl, reverse, gap = [], [], 0, 0, [], [], []
    bins = [[0, 0.0, 0.0] for _ in range(15)]
    for pixel in pixels:
        p, q, label = softmax(theirs[pixel]), softmax(ours[pixel]), label_of(pixel)
        mine, its = q.index(max(q)), p.index(max(p))
        wrong.append(mine != label)
        same.append(mine == its)
        errors += its != label
        copied += its != label and mine == its
        kl.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
        reverse.append(sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True)))
        gap.append(math.log(p[label]) - math.log(q[label]))
        found = bins[min(14, int(max(q) * 15))]
        found[0], found[1], found[2] = found[0] + 1, found[1] + max(q), found[2] + (mine == label)
    rows = len(pixels)
    return {
        "error_rate": sum(wrong) / rows,
        "sequence_agreement": sum(same) / rows,
        "top1_agreement": sum(same) / rows,
        "agreement_on_teacher_errors": copied / errors,
        "kl_teacher_student": sum(kl) / rows,
        "kl_student_teacher": sum(reverse) / rows,
        "nll_gap": sum(gap) / rows,
        "ece": sum(abs(confidence - hits) for _, confidence, hits in bins) / rows,
        "ece_if_calibrated": sum(
            math.sqrt(2 / math.pi * n * (total / n) * (1 - total / n)) for n, total, _ in bins if n
        )
        / rows,
    }


MODELS = ("teacher", "good", "poor", "baseline", "low_data")


def entry_of(result: dict, name: str) -> dict:
    return {"teacher": result["teacher"], **result["students"], **result["controls"]}[name]


@pytest.mark.parametrize("split", ["heldout", "far"])
@pytest.mark.parametrize("name", MODELS)
def test_every_metric_of_every_seed_and_split(name, split, made):
    entry = entry_of(made.result, name)
    values = entry if split == "heldout" else entry[split]
    seeds = [0] if name == "teacher" else SEEDS
    figures = [expected(made, name, seed, split) for seed in seeds]
    names = set(figures[0])
    if name == "teacher":  # no fidelity to itself
        names = {"error_rate", "ece", "ece_if_calibrated"}
    assert set(values["quality"]) | set(values["fidelity"]) == names
    for metric in names:
        found = {**values["quality"], **values["fidelity"]}[metric]
        per_seed = [figure[metric] for figure in figures]
        assert found["per_seed"] == pytest.approx(per_seed, abs=2e-6), metric
        assert found["mean"] == pytest.approx(sum(per_seed) / len(per_seed), abs=2e-6)
        low, high = found["ci95"]
        assert low <= found["mean"] <= high


def test_the_interval_of_one_model_is_that_of_its_rows(made):
    """A rate over 40 rows: about 1.96 standard errors to each side."""
    found = made.result["teacher"]["quality"]["error_rate"]
    deviation = math.sqrt(found["mean"] * (1 - found["mean"]) / SIZES["heldout"])
    low, high = found["ci95"]
    assert high - low == pytest.approx(2 * 2.02 * deviation, rel=0.03)


def test_the_validation_split_is_another_result(made, capsys):
    assert judge.main([str(made.run.folder), "--split", "validation"]) == 0
    output = capsys.readouterr().out
    rate = expected(made, "teacher", 0, "validation")["error_rate"]
    assert re.search(rf"teacher +\|[^|]*\|[^|]*\| +{100 * rate:.1f} \[", output)
    assert json.loads((made.run.folder / "eval.json").read_text("utf-8"))["split"] == "heldout"


def mean_of(made, name: str, metric: str, split: str = "heldout") -> float:
    seeds = [0] if name == "teacher" else SEEDS
    return sum(expected(made, name, seed, split)[metric] for seed in seeds) / len(seeds)


LOWER = {"error_rate", "kl_teacher_student"}
RESULTS = (
    "better", "worse", "too little", "better", "better", "matches", "does not match",
    "does not match", "keeps",
)  # fmt: skip
FAMILIES = (3, 3, 3, 1, 1, 3, 3, 3, 1)  # how many claims ask the same question


@pytest.mark.parametrize("number", range(len(RESULTS)))
def test_every_verdict(number, made):
    claim, found = CONFIG["verdicts"][number], made.result["verdicts"][number]
    assert (found["claim"], found["metric"]) == (claim["claim"], claim["metric"])
    first, verb, second = claim["claim"].split()
    metric, split = claim["metric"], claim.get("split", "heldout")
    sign = -1 if metric in LOWER else 1
    share = claim["threshold"] if verb == "keeps" else 1
    reference = 1.0 if second == "teacher" else mean_of(made, second, metric, split)
    difference = sign * (mean_of(made, first, metric, split) - share * reference)
    assert found["difference"] == pytest.approx(difference, abs=2e-6)
    assert found["threshold"] == claim.get("threshold", 0.0)
    assert found["result"] == RESULTS[number]
    low, high = found["ci95"]
    assert (low + high) / 2 == pytest.approx(found["difference"])
    assert found["seeds"] == len(SEEDS)
    assert found["comparisons"] == FAMILIES[number]


def test_gaps_are_shares_of_the_distance_to_the_teacher(made):
    for control in ("baseline", "low_data"):
        found = made.result["gaps"]["good"][f"{control}_to_teacher"]
        low, student, high = (
            mean_of(made, name, "error_rate") for name in (control, "good", "teacher")
        )
        assert found["gap"] == pytest.approx(low - high, abs=1e-6)
        if found["share"] is not None:
            assert found["share"] == pytest.approx((low - student) / (low - high), abs=1e-6)
    assert made.result["gaps"]["good"]["low_data_to_teacher"]["share"] is not None


def test_update_also_writes_the_result_to_results(made, tmp_path, monkeypatch, capsys):
    pages = [tmp_path / "README.md", tmp_path / "docs" / "results.md"]
    pages[1].parent.mkdir()
    for page in pages:
        page.write_text("Before\n<!-- results/cards.json -->\n<!-- end -->\nAfter", "utf-8")
    monkeypatch.setattr(judge, "RESULTS", tmp_path / "results")
    assert judge.main([str(made.run.folder), "--update"]) == 0
    written = json.loads((tmp_path / "results" / "cards.json").read_text("utf-8"))
    assert written["verdicts"] == made.result["verdicts"]
    for page in pages:
        text = page.read_text("utf-8")
        assert row_of(text, "good")
        assert text.startswith("Before\n<!-- results/cards.json -->\n| ")
        assert text.endswith("\n<!-- end -->\nAfter")
    printed, folder = capsys.readouterr().out, made.run.folder
    assert f"report  {folder / 'report.html'}\nfigures {folder / 'eval.json'}\n" in printed
    assert f"next: {command_line('eval.py', folder, '--ask', 22)}" in printed


# -- cost ------------------------------------------------------------------------------------------


def costs_of(made, name: str) -> list[dict]:
    numbered = {stage: number for number, (stage, *_) in enumerate(stages(made.plan))}
    return [cost_of(numbered[made.plan.stage(name, seed)]) for seed in SEEDS]


@pytest.mark.parametrize("key", ["flops", "seconds", "joules", "money"])
def test_the_cost_of_a_student_includes_its_outputs(key, made):
    """The median student and the outputs, as a fraction of the teacher; controls need none."""
    fractions = made.result["cost"]["fraction_of_teacher_by_student"]
    for name in ("good", "poor", "baseline", "low_data"):
        student = statistics.median(cost[key] for cost in costs_of(made, name))
        outputs = cost_of(1)[key] if name in ("good", "poor") else 0
        assert fractions[name][key] == pytest.approx((student + outputs) / cost_of(0)[key])
    assert made.result["cost"]["fraction_of_teacher"] == fractions["good"]


def test_the_teacher_is_charged_once_for_all_its_students(made):
    shares = made.result["cost"]["flops_per_student_with_teacher"]
    teacher, outputs = cost_of(0)["flops"], cost_of(1)["flops"]
    each = costs_of(made, "good")[0]["flops"]
    for count in (1, 10, 100):
        total = teacher + outputs + count * each
        assert shares[str(count)] == pytest.approx(total / (count * teacher))


def test_every_stage_is_in_the_cost_table(made):
    rows = made.result["cost"]["stages"]
    assert [row["stage"] for row in rows] == [*(s for s, *_ in stages(made.plan)), "evaluation"]
    for number, row in enumerate(rows[:-1]):
        assert {key: row[key] for key in cost_of(number)} == cost_of(number)


# -- what people read ------------------------------------------------------------------------------


def shown(value: float, metric: str) -> str:
    return (
        f"{value:.3f}" if metric.startswith("kl") or metric == "nll_gap" else f"{100 * value:.1f}"
    )


def test_the_cells_of_the_table_are_the_means(made):
    text = markdown(made.result)
    shares = {"teacher": "100"}
    for name in MODELS[1:]:
        outputs = cost_of(1)["flops"] if name in ("good", "poor") else 0
        student = statistics.median(cost["flops"] for cost in costs_of(made, name))
        shares[name] = f"{100 * (student + outputs) / cost_of(0)['flops']:.1f}"
    for name in MODELS:
        cells = [cell.strip() for cell in row_of(text, name).strip("|").split("|")]
        metrics = [
            "-" if name == "teacher" and metric not in ("error_rate", "ece")
            else shown(mean_of(made, name, metric), metric)
            for metric in Cards.table
        ]  # fmt: skip
        parameters = PIXELS * PIXELS + PIXELS + PIXELS * LABELS + LABELS
        assert cells == [name, f"{parameters:,}", shares[name], *metrics]
    assert "errors %" in text
    assert "KL to teacher, nats" in text


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_the_console_shows_means_with_their_intervals(made, capsys):
    print_result(made.result)
    printed = capsys.readouterr().out
    found = made.result["students"]["good"]["quality"]["error_rate"]
    low, high = (f"{100 * bound:.1f}" for bound in found["ci95"])
    assert f"{100 * found['mean']:.1f} [{low}, {high}]" in printed


def test_the_sentences_state_the_same_numbers(made):
    facts = facts_of(made.result)
    assert "poor is" in facts[0]  # a pair that is compared in one metric alone
    points = 100 * (mean_of(made, "poor", "error_rate") - mean_of(made, "good", "error_rate"))
    assert facts[0].startswith(f"poor is {points:.1f} points of errors worse than good [")
    assert facts[1].startswith(
        f"too little: good is {points:.1f} points of errors better than poor ["
    )
    assert facts[1].endswith("more than 90 claimed")
    share = 100 * made.result["cost"]["fraction_of_teacher"]["flops"]
    shares = made.result["cost"]["fraction_of_teacher_by_student"]
    assert len({round(found["flops"], 3) for found in shares.values()}) > 1
    line = f"set to {share:.1f} % of the teacher's training FLOPs: outputs and good"
    assert any(fact.startswith(line) for fact in facts)
    measured = {
        name: " / ".join(f"{100 * shares[name][key]:.0f}" for key in ("seconds", "joules", "money"))
        for name in ("good", "poor")
    }
    start = "measured for outputs and one student, in % of the teacher's seconds / joules / money: "
    (line,) = (fact for fact in facts if fact.startswith(start))
    for name, values in measured.items():
        assert f"{name} {values}" in line
    busy = made.result | {"cost": made.result["cost"] | {"load_of_others": 0.83}}
    assert not any(fact.startswith(start) for fact in facts_of(busy))
    left_out = "seconds, joules and money are left out: other programs did 83 % of the machine's"
    assert any(fact.startswith(left_out) for fact in facts_of(busy))
    total = made.result["cost"]["flops_per_student_with_teacher"]
    expected = f"{100 * total['1']:.0f} % for 1, {100 * total['10']:.0f} % each for 10"
    assert any(expected in fact for fact in facts)
    gap = made.result["gaps"]["good"]["low_data_to_teacher"]
    low, high = (100 * bound for bound in gap["ci95"])
    line = (
        f"good closes {100 * gap['share']:.0f} % [{low:.0f}, {high:.0f}] of the gap from low_data"
    )
    assert any(fact.startswith(line) for fact in facts)


def test_the_table_of_claims_has_a_pair_for_each_row_and_a_metric_for_each_column(made):
    """Of pairs that are compared in several metrics."""
    ((title, headings, rows),) = claims_table(made.result)
    assert title.startswith("Claims over 5 seeds: ")
    assert headings == ["", "errors, points", "KL to teacher, nats"]
    ((label, errors, divergence),) = rows
    assert label == "good against poor"
    points = 100 * (mean_of(made, "poor", "error_rate") - mean_of(made, "good", "error_rate"))
    low, high = (f"{100 * bound:.1f}" for bound in made.result["verdicts"][0]["ci95"])
    assert errors == f"+{points:.1f} [{low}, {high}] better"
    nats = mean_of(made, "poor", "kl_teacher_student") - mean_of(made, "good", "kl_teacher_student")
    assert divergence.startswith(f"+{nats:.3f} [")
    assert f"| {label} | {errors} | {divergence} |" in markdown(made.result)
    assert errors in made.report.replace("\n[", " [")


def test_the_report_shows_every_model_split_stage_and_verdict(made):
    text = re.sub(r"<[^>]+>", "\t", made.report.replace("\n[", " ["))
    text = re.sub(r"\s*\t\s*", "\t", text)
    for name in MODELS:
        for split in ("heldout", "far"):
            entry = entry_of(made.result, name)
            values = entry if split == "heldout" else entry[split]
            found = {**values["quality"], **values["fidelity"]}
            for metric, value in found.items():
                low, high = (shown(bound, metric) for bound in value["ci95"])
                cell = f"{shown(value['mean'], metric)} [{low}, {high}]".replace("-0.000", "0.000")
                assert f"\t{cell}\t" in text, (name, split, metric)
    for number, (stage, *_) in enumerate(stages(made.plan)):
        cost = cost_of(number)
        row = (
            f"\t{stage}\t{cost['flops'] / 1e12:.3f}\t{cost['seconds']:.1f}\t-\t"
            f"{cost['joules']:.0f}\t{cost['money']:.5f} EUR\t{cost['peak_memory_mb']}\t"
        )
        assert row in text, stage
    for fact in facts_of(made.result):
        assert with_whole_numbers(fact.replace("'", "&#39;")) in made.report


def test_answers_in_the_report_and_of_ask_are_those_of_the_models(made, capsys):
    assert judge.main([str(made.run.folder), "--ask", "22"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    for name in ("teacher", "good", "poor", "baseline"):
        seed = 0 if name == "teacher" else SEEDS[0]
        q = softmax(made.tables[name, seed][22])
        answer = q.index(max(q))
        grade = "right" if answer == label_of(22) else "wrong"
        assert [name, str(answer), grade, f"{max(q):.3f}"] in cells
    assert ["right answer", str(label_of(22)), "", ""] in cells
