"""The check of a rerun: what it expects, what it finds, and how it exits."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import chi2, norm

import eval as judge
import experiment.check
from configs.files import write_json
from configs.schema import LabError
from experiment.check import MEANINGS, check, compare_runs, expected_tier, inside_bands
from experiment.reading import read_config
from experiment.reference import (
    band,
    bands,
    committed_differences,
    write_reference,
)
from experiment.run import Run, read_lines
from measure.verdicts import claim_of
from tests.browser import problems_of
from tests.helpers import ROOT, TINY, edit_log, edited


def environment(**changed):
    same = {
        "code": "c0de", "packages": {"torch": "2.13.0"}, "threads": 2, "cpu": "one",
        "cpu_capability": "AVX2", "gpu": None, "platform": "here",
    }  # fmt: skip
    return {**same, **changed}


def result(
    agreement=0.6, losses=(3.0, 2.0), precision="float32", sha256="a", seed=0, verdict="one run",
    difference=0.05, **changed,
):  # fmt: skip
    metric = {"mean": agreement, "ci95": [0, 1], "per_seed": [agreement]}
    entry = {"quality": {}, "fidelity": {"sequence_agreement": metric}}
    return {
        "config": {
            "precision": precision,
            "teacher": {"seed": seed},
            "task": {"name": "pronounce"},
        },
        "split": "heldout",
        "seeds": [0],
        "teacher": {"quality": {}, "fidelity": {}},
        "students": {"distilled": entry},
        "controls": {},
        "verdicts": [
            {
                "claim": "distilled beats baseline",
                "metric": "sequence_agreement",
                "split": "heldout",
                "threshold": 0.0,
                "result": verdict,
                "per_seed": [difference],
            }
        ],
        "environment": {"trained": environment(**changed)},
        "artifacts": {"rows": "r", "teacher": sha256},
        "trace": {"teacher": list(losses)},
    }


def reference(**changed):
    values = np.random.default_rng(0).normal(0.6, 0.01, 10)
    differences = np.random.default_rng(1).normal(0.05, 0.01, 10)
    pairs = enumerate(zip(values, differences, strict=True))
    found = bands([result(agreement=v, difference=d, seed=seed) for seed, (v, d) in pairs])
    return {**result(**changed), "bands": found}


@pytest.mark.parametrize(("values", "factor"), [(10, 3.379), (20, 2.752)])
def test_tolerance_factors_are_those_of_the_tables(values, factor):
    """Of NIST's handbook, 7.2.6.3."""
    numbers = np.random.default_rng(0).normal(0, 1, values)
    found = band([[number] for number in numbers], 0.95)
    half = (found["high"] - found["low"]) / 2
    assert half / numbers.std(ddof=1) == pytest.approx(factor, rel=0.01)


def many(values, seed):
    """A result with as many metrics as values."""
    found = result(seed=seed) | {"verdicts": []}
    metric = found["students"]["distilled"]["fidelity"]["sequence_agreement"]
    found["students"]["distilled"]["fidelity"] = {
        f"metric{i}": {**metric, "per_seed": [float(value)]} for i, value in enumerate(values)
    }
    return found


@pytest.mark.parametrize("metrics", [1, 40])
def test_bands_hold_all_metrics_of_95_percent_of_seeds_with_95_percent_confidence(metrics):
    generator = np.random.default_rng(0)
    held = []
    for _ in range(200):
        found = bands([many(generator.normal(0.5, 0.02, metrics), seed) for seed in range(10)])
        low, high = (np.array([band[end] for band in found.values()]) for end in ("low", "high"))
        seeds = generator.normal(0.5, 0.02, (1000, metrics))
        held.append(((low <= seeds) & (seeds <= high)).all(axis=1).mean() >= 0.95)
    assert np.mean(held) >= 0.9 if metrics > 1 else np.mean(held) == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(("teachers", "students"), [(10, 1), (5, 2), (5, 8)])
@pytest.mark.parametrize("between_teachers", [0.0, 0.02, 0.1])
def test_bands_hold_students_of_other_teachers_too(teachers, students, between_teachers):
    """The spread within a teacher is 0.02; a new run has a new teacher."""
    generator = np.random.default_rng([teachers, students, round(100 * between_teachers)])
    runs, held = 300, 0
    for _ in range(runs):
        teacher = between_teachers * generator.standard_normal((teachers, 1))
        groups = teacher + 0.02 * generator.standard_normal((teachers, students))
        found = band(groups.tolist(), 0.95)
        spread = np.hypot(between_teachers, 0.02)
        high, low = norm.cdf([found["high"] / spread, found["low"] / spread])
        held += high - low >= 0.95
    assert held / runs >= 0.92


def test_a_band_by_hand():
    """Two teachers of two students: 0.1 and 0.3, 0.5 and 0.7."""
    found = band([[0.1, 0.3], [0.5, 0.7]], 0.95)
    of_means, within = 0.08, 0.5 * (4 * 0.1**2) / 2  # (1 - 1/2) of the mean square within
    beyond = of_means * (1 / chi2.ppf(0.05, 1) - 1), within * (2 / chi2.ppf(0.05, 2) - 1)
    variance = of_means + within + math.hypot(*beyond)
    variance *= 1 + of_means / 2 / (of_means + within)
    assert found["values"] == [0.1, 0.3, 0.5, 0.7]
    assert found["high"] == pytest.approx(0.4 + 1.959964 * variance**0.5)
    assert found["low"] == pytest.approx(0.4 - 1.959964 * variance**0.5)


def test_one_teacher_makes_no_bands():
    results = [result(seed=0) | {"seeds": [seed]} for seed in range(12)]
    for number in range(1, 5):
        assert bands(results) is None
        results[number]["config"]["teacher"]["seed"] = number
    assert bands(results) is not None


def test_a_metric_that_is_not_a_number_makes_no_band():
    results = [result(seed=seed) for seed in range(10)]
    results[3] = result(seed=3, agreement=float("nan"))
    with pytest.raises(LabError, match="not a number"):
        bands(results)


def test_a_metric_that_some_run_lacks_has_no_band():
    results = [result(seed=seed) for seed in range(10)]
    results[3]["students"]["distilled"]["quality"] = {"word_error_rate": {"per_seed": [None]}}
    assert set(bands(results)) == {
        "distilled sequence_agreement", "distilled beats baseline: sequence_agreement",
    }  # fmt: skip


def test_a_metric_at_its_limit_may_move_by_a_word_or_two():
    there = {**reference(), "bands": bands([result(agreement=1.0, seed=s) for s in range(10)])}
    assert check(result(agreement=1 - 2 / 6298, sha256="b"), there)[0] == "C"
    assert check(result(agreement=1 - 20 / 6298, sha256="b"), there)[0] == "D"


def test_one_seed_far_out_is_not_hidden_by_the_mean_of_all():
    there = reference()
    found = result(sha256="b")
    metric = found["students"]["distilled"]["fidelity"]["sequence_agreement"]
    metric["per_seed"] = [0.6, 0.6, 0.6, 0.7]
    assert check(found, there)[0] == "D"


def test_equal_hashes_with_other_figures_are_not_tier_a():
    tier, lines = check(result(agreement=0.61), reference())
    assert tier != "A"
    assert lines[1].endswith("not the metrics")


def test_a_metric_at_the_edge_of_its_band_is_inside():
    band = {"distilled sequence_agreement": {"low": 0.25, "high": 0.75}}
    for edge in (0.25, 0.75):
        assert inside_bands(result(agreement=edge), {"bands": band}) == ([*band], [])


def test_nine_seeds_make_no_band():
    assert bands([result(seed=seed) for seed in range(9)]) is None


def test_a_run_that_is_counted_twice_makes_no_band():
    with pytest.raises(LabError, match="hold the same student"):
        bands([result(seed=seed) for seed in (*range(9), 8)])


def test_nan_and_missing_metrics_fail_a_check():
    there, nan = reference(), float("nan")
    assert check(result(agreement=nan, sha256="b"), there)[0] == "D"
    gone = result(sha256="b")
    gone["students"]["distilled"]["fidelity"] = {}
    assert check(gone, there)[0] == "D"
    trace = reference(precision="float64")
    assert check(result(sha256="b", losses=(3.0, nan)), trace)[0] == "D"
    assert check(result(sha256="b"), {**trace, "trace": {}})[0] == "D"
    more = result(sha256="b")
    more["trace"]["second_teacher"] = [1.0]
    assert check(more, trace)[0] == "D"


def test_a_run_on_other_rows_is_different_whatever_its_figures():
    found = result(agreement=0.605, sha256="b")
    found["artifacts"]["rows"] = "others"
    assert check(found, reference())[0] == "D"


def test_a_tier_below_the_expected_one_is_reported():
    tier, lines = check(result(agreement=0.605, sha256="b"), reference())
    assert tier == "C"
    assert lines[-1].endswith("where A was expected")


def test_equal_hashes_are_tier_a_whatever_the_machine():
    tier, lines = check(result(threads=8), reference())
    assert tier == "A"
    assert len(lines) == 5
    assert lines[0] == "expected  tier C: different threads"
    assert lines[1] == "hashes    2 of 2 equal"


def test_other_hashes_inside_the_band_are_tier_c_and_outside_d():
    tier, lines = check(result(agreement=0.605, sha256="b"), reference())
    assert (tier, lines[1]) == ("C", "hashes    1 of 2 equal, not teacher")
    tier, lines = check(result(agreement=0.7, sha256="b"), reference())
    assert tier == "D"
    inside = "bands     1 of 2 metrics and differences inside"
    assert lines[2] == f"{inside}, outside: distilled sequence_agreement"


def test_the_first_three_outside_are_named():
    outside = ["a one", "b two", "c three", "d four"]
    line = experiment.check.band_line(["e five"], outside)
    assert line == (
        "bands     1 of 5 metrics and differences inside, outside: a one, b two, c three"
    )


def test_no_bands_and_nothing_inside_the_bands_are_two_things():
    assert "none are committed" in experiment.check.band_line([], [])
    assert experiment.check.band_line([], ["a one"]) == (
        "bands     0 of 1 metrics and differences inside, outside: a one"
    )


def test_a_claims_difference_must_lie_in_its_band_too():
    tier, lines = check(result(difference=-0.1, sha256="b"), reference())
    assert tier == "D"
    assert lines[2].endswith("outside: distilled beats baseline: sequence_agreement")


def test_a_changed_verdict_is_different_whatever_the_figures():
    tier, lines = check(result(sha256="b", verdict="worse"), reference(verdict="better"))
    assert tier == "D"
    assert lines[3] == (
        "verdicts  1 of 1 changed, first distilled beats baseline: sequence_agreement: better "
        "there, worse here"
    )
    assert check(result(sha256="b"), reference())[1][3] == "verdicts  1 of 1 the same"
    same = check(result(verdict="worse"), reference(verdict="better"))
    assert same[0] == "D"  # whatever the hashes
    gone = result(sha256="b") | {"verdicts": []}
    assert "one run there, none here" in check(gone, reference())[1][3]


def test_without_bands_other_hashes_cannot_be_judged():
    there = {**reference(), "bands": None}
    assert check(result(sha256="b"), there)[0] == "?"
    assert check(result(sha256="b", agreement=0.9, verdict="worse"), there)[0] == "?"
    assert check(result(sha256="b", verdict="worse"), there)[0] == "D"  # from equal figures
    assert check(result(), there)[0] == "A"
    other = result(sha256="b")
    other["artifacts"]["rows"] = "others"
    assert check(other, there)[0] == "D"


def test_a_float64_trace_is_tier_b_to_1e_9():
    there = reference(precision="float64")
    assert check(result(sha256="b", losses=(3.0, 2.0 + 5e-10)), there)[0] == "B"
    tier, lines = check(result(sha256="b", losses=(3.0, 2.0 + 5e-9)), there)
    assert tier == "D"
    assert "differs in 1 of 1 stages, first teacher at step 2" in lines[2]
    assert check(result(sha256="b", losses=(3.0,)), there)[0] == "D"


@pytest.mark.parametrize(
    ("changed", "tier", "why"),
    [
        ({}, "A", "same code, torch, processor and threads"),
        ({"code": "other"}, "C", "different code"),
        ({"packages": {"torch": "2.9"}, "cpu": "x"}, "C", "different torch, cpu"),
    ],
)
def test_the_tier_to_expect_follows_from_the_environments(changed, tier, why):
    both = [environment(), environment(**changed)]
    assert expected_tier(both, "float32") == (tier, why)
    if changed:
        assert expected_tier(both, "float64") == ("B", why)


def test_a_run_started_in_another_environment_is_not_expected_to_be_equal():
    started_elsewhere = reference()
    started_elsewhere["environment"]["earlier"] = [environment(threads=1)]
    _, lines = check(result(), started_elsewhere)
    assert lines[0] == "expected  tier C: different threads"


def test_a_different_run_is_called_so_without_the_tier_that_was_expected():
    tier, lines = check(result(agreement=0.1, sha256="b"), reference())
    assert (tier, lines[-1]) == ("D", f"tier      D: {MEANINGS['D']}")


def test_a_result_on_other_rows_is_tier_d():
    there = {**reference(), "rows": {"heldout": "r", "long": "l"}}
    assert check({**result(), "rows": {"heldout": "r", "long": "l"}}, there)[0] == "A"
    assert check({**result(), "rows": {"heldout": "r", "long": "other"}}, there)[0] == "D"


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def committed(tiny_run, tmp_path, monkeypatch):
    """A separate results/ with the tiny run in it."""
    monkeypatch.setattr(judge, "RESULTS", tmp_path / "results")
    (tmp_path / "README.md").write_text("<!-- results/tiny.json -->\n<!-- end -->", "utf-8")
    run = Run.finished(tiny_run)
    write_reference(run, run.config(), [], judge.RESULTS)
    return tmp_path / "results" / "tiny.json"


def test_a_run_checks_against_what_it_wrote(committed, tiny_run, capsys):
    capsys.readouterr()
    assert judge.main([str(tiny_run), "--check"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 5
    assert lines[0] == "expected  tier A: same code, torch, processor and threads"
    assert lines[-1] == "tier      A: equal bit for bit"


def test_outputs_of_another_run_are_rejected(committed, tiny_run, tmp_path, capsys):
    import shutil

    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "outputs" / "data-logits")
    shutil.copytree(run / "outputs" / "teacher-text-train", run / "outputs" / "data-logits")
    assert judge.main([str(run), "--check"]) == 2
    assert "does not hold the outputs that this run made" in capsys.readouterr().err


def test_a_second_implementation_counts_the_same_steps(committed, tiny_run, tmp_path, capsys):
    import shutil

    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    with edited(run / "eval.json") as found:
        found["environment"]["evaluation"] = "older"
        found["students"]["distilled"]["fidelity"]["sequence_agreement"]["per_seed"] = [1.0, 1.0]
    assert judge.main([str(run), "--check"]) == 0
    assert "tier      A" in capsys.readouterr().out


def test_a_reader_finds_the_page_of_a_check_legible_in_every_window(committed, copy):
    assert judge.main([str(copy), "--check"]) == 0
    assert problems_of(copy / "check.html") == []


def test_compare_names_every_metric_that_differs(tiny_run, copy, committed):
    with edited(copy / "eval.json") as found:
        found["students"]["distilled"]["quality"]["word_error_rate"]["mean"] = 0.123
        found["teacher"]["params"] += 1000
    a, b = Run.finished(tiny_run), Run.finished(copy)
    result = json.loads((tiny_run / "eval.json").read_text("utf-8"))
    before = 100 * result["students"]["distilled"]["quality"]["word_error_rate"]["mean"]
    size = result["teacher"]["params"]
    assert compare_runs(a, b)[-2:] == [
        f"metrics   teacher: parameters {size:,} and {size + 1000:,}",
        f"metrics   distilled: word errors % {before:.1f} and 12.3",
    ]
    (copy / "eval.json").unlink()
    assert compare_runs(a, Run.finished(copy))[-1].startswith("metrics   not compared: evaluate")


def test_a_read_only_run_is_checked(committed, tiny_run, monkeypatch, capsys):
    def refused(file, _):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(experiment.check, "write_atomically", refused)
    assert judge.main([str(tiny_run), "--check"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip().endswith("tier      A: equal bit for bit")
    assert "check.html is not written" in printed.err


@pytest.mark.parametrize(("artifact", "code"), [("teacher", 2), ("rows", 1)])
def test_a_run_that_differs_exits_with_1_and_one_that_cannot_be_judged_with_2(
    artifact, code, committed, tiny_run, capsys
):
    changed = json.loads(committed.read_text("utf-8"))
    changed["artifacts"][artifact] = "0" * 64
    committed.write_text(json.dumps(changed), "utf-8")
    assert judge.main([str(tiny_run), "--check"]) == code
    assert f"not {artifact}" in capsys.readouterr().out


def test_one_run_is_shown_beside_the_committed_ones(committed, tiny_run, capsys):
    """After bands are written, and only if the config is the same."""
    stored = json.loads(committed.read_text("utf-8"))
    claim = claim_of(stored["verdicts"][0])
    stored["bands"] = {claim: {"low": -1, "high": 1, "values": [0.01, 0.02, -0.01]}}
    config = read_config(TINY)
    write_json(committed, stored)
    mean, spread = pytest.approx(0.02 / 3), pytest.approx(0.0152753, rel=1e-5)
    values = [0.01, 0.02, -0.01]
    expected = {"mean": mean, "spread": spread, "runs": 3, "ahead": 2, "values": values}
    assert committed_differences(config, committed.parent)[claim] == expected
    stored["config"]["teacher"]["seed"] = 7
    write_json(committed, stored)
    assert committed_differences(config, committed.parent)[claim] == expected
    stored["config"]["students"]["budget"] = 0.5
    write_json(committed, stored)
    assert committed_differences(config, committed.parent) == {}


def test_a_run_of_another_config_cannot_be_checked(committed, tiny_run, capsys):
    changed = json.loads(committed.read_text("utf-8"))
    changed["config"]["teacher"]["epochs"] = 99.0
    committed.write_text(json.dumps(changed), "utf-8")
    assert judge.main([str(tiny_run), "--check"]) == 2
    assert "teacher.epochs: 99.0 there" in capsys.readouterr().err
    assert judge.main([str(tiny_run), "--check", "tini"]) == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err


def without(lines, stage):
    return [line for line in lines if line["stage"] != stage]


def test_compare_names_the_causes_in_order_and_the_step_where_losses_part(
    tiny_run, tmp_path, capsys
):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    with edited(other / "manifest.json") as manifest:
        manifest["environment"]["threads"] = 7
        manifest["environment"]["packages"]["torch"] = "1.0"
    third = read_lines(other)[2]
    edit_log(other, lambda lines: lines[2].update(loss=third["loss"] + 1e-6))
    a, b = Run.finished(tiny_run), Run.finished(other)
    report = compare_runs(a, b)
    assert [line.split()[0] for line in report] == [
        "code", "config", "versions", "machine", "threads", "data", "seeds", "hashes", "losses",
        "metrics",
    ]  # fmt: skip
    assert "torch: '" in report[2]
    assert report[4] == f"threads   threads: {a.manifest['environment']['threads']} there, 7 here"
    assert f"{third['stage']} by step {third['step']}" in report[-2]
    assert compare_runs(a, a)[-2:] == ["losses    equal", "metrics   equal, as printed"]
    assert judge.main(["--compare", str(tiny_run), str(other)]) == 0
    assert capsys.readouterr().out.splitlines() == report
    last = read_lines(other)[-1]["stage"]
    shutil.rmtree(other)
    shutil.copytree(tiny_run, other)
    edit_log(other, lambda lines: lines.__setitem__(slice(None), without(lines, last)))
    for first, second in ((a, Run.finished(other)), (Run.finished(other), a)):
        assert f"diverge: {last} by step" in compare_runs(first, second)[-2]  # in one run alone
    edit_log(other, lambda lines: lines.__delitem__(slice(2, None)))
    assert " and nothing)" in compare_runs(a, Run.finished(other))[-2]


def test_environment_prints_what_a_bug_report_needs(capsys):
    judge.main(["--environment"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("[OK] ", "[FAIL]")) for line in lines)
    for word in ("Python 3", "torch 2", "threads", "memory", "disk", "pronounce", "commit"):
        assert any(word in line for line in lines)


@pytest.mark.slow
def test_the_float64_trace_is_the_committed_one_on_any_number_of_threads(tmp_path):
    for threads in (1, 2):
        command = [sys.executable, "train.py", "configs/trace-float64.yaml", f"threads={threads}"]
        run = [*command, "--runs", str(tmp_path / str(threads))]
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
        folder = tmp_path / str(threads) / "trace-float64"
        assert judge.main([str(folder), "--check"]) == 0
