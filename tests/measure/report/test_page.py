"""The report."""

import json

from measure.laws import students_differing_in


def test_the_report_is_one_self_contained_file(tiny_run):
    report = (tiny_run / "report.html").read_text(encoding="utf-8")
    for heading in ("Learning curves", "Fidelity against cost", "Reliability", "Dark knowledge"):
        assert heading in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "<script src" not in report
    assert "{{" not in report


def test_the_report_draws_what_the_recipes_have_in_common(methods_run):
    report = (methods_run.folder / "report.html").read_text("utf-8")
    for heading in ("Bytes against fidelity", "Temperature", "Fidelity against cost"):
        assert f"<h2>{heading}</h2>" in report
    assert "<h2>How many words</h2>" not in report
    result = json.loads((methods_run.folder / "eval.json").read_text("utf-8"))
    assert students_differing_in(result, ("temperature",)) == ["plain", "warm", "hot"]
    assert students_differing_in(result, ("access", "outputs.k")) == ["plain", "top_5", "sampled_6"]
