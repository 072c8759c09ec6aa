"""Alarms over a usage log: customers are left alone, and who extracts is found."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta

from configs.schema import LabError
from measure import detection, extraction
from measure.alarms import AS_IT_GOES, AT_THE_END, TOGETHER, Watch
from measure.detection import WANTED, Rate, scored, seen_attacks, together
from measure.detectors import DETECTORS
from measure.usage import FEWEST, Map, checkpoints, read_log
from teacher.api.store import Store
from tests.usage_log import subjects, write_usage_log

pytestmark = pytest.mark.xdist_group("usage")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Customers before, a log with extractors, {account: kind} of the second, their folder."""
    folder, pool = tmp_path_factory.mktemp("usage"), subjects(60, 40)
    write_usage_log(folder / "before.sqlite", pool, 240, 0, 3, seed=1)
    kinds = write_usage_log(folder / "now.sqlite", pool, 120, 6, 3, seed=2)
    return (*(read_log(folder / f"{name}.sqlite") for name in ("before", "now")), kinds, folder)


@pytest.fixture(scope="module")
def watch(logs):
    return Watch(logs[0])


@pytest.fixture(scope="module")
def alarms(logs, watch):
    return [*watch.alarms(logs[1])]


def test_customers_are_left_alone_and_extractors_found(logs, watch, alarms):
    found = scored(watch, logs[1], alarms, logs[2]).rates
    assert found[AS_IT_GOES]["naive"].share == 1
    assert found[AT_THE_END]["throttled"].share >= 0.75
    assert found[TOGETHER]["hydra"].share == 1
    for rule in (AS_IT_GOES, AT_THE_END):
        assert found[rule]["customers"].share <= 0.03


def test_an_alarm_comes_while_the_extraction_goes_on(logs, watch, alarms):
    found = scored(watch, logs[1], alarms, logs[2])
    tokens = found.tokens["naive"]
    assert found.auc > 0.85
    whole = [one.tokens.sum() for one in logs[1].accounts if logs[2][one.name] == "naive"]
    assert 0 < np.median(tokens) < 0.6 * np.median(whole)


@pytest.mark.parametrize("detector", DETECTORS)
def test_customers_like_those_of_before_exceed_a_threshold_at_its_rate(detector, logs):
    """Whatever the detector: half of the known customers are new to the other half."""
    before = logs[0]
    draw = np.random.Generator(np.random.PCG64(3))
    order = draw.permutation(len(before.accounts))
    known, new = (
        type(before)([before.accounts[i] for i in order[part::2]], before.prompts)
        for part in (0, 1)
    )
    found = [*Watch(known, detector, false_alarms=0.1).alarms(new)]
    for rule in (AS_IT_GOES, AT_THE_END):
        count = sum(one.rule == rule for one in found)
        judged = sum(len(one) >= FEWEST for one in new.accounts)
        # of a beta-binomial: the threshold is drawn, too
        assert count <= judged * beta.ppf(0.999, 0.1 * judged, 0.9 * judged) * 1.5


def test_nothing_is_learned_from_who_was_what(logs, alarms, watch):
    """Other names, the same alarms."""
    log = logs[1]
    renamed = type(log)([replace(a, name=f"x{i}") for i, a in enumerate(log.accounts)], log.prompts)
    same = [(one.rule, one.at, one.p) for one in watch.alarms(renamed)]
    assert same == [(one.rule, one.at, one.p) for one in alarms]


def test_too_few_customers_are_no_ground_for_an_alarm(logs):
    few = type(logs[0])(logs[0].accounts[:50], logs[0].prompts)
    with pytest.raises(LabError, match=r"a rate of 0\.01 false alarms needs 99"):
        Watch(few)


def test_checkpoints_grow_with_the_requests(logs):
    account = max(logs[1].accounts, key=len)
    found = checkpoints(account)
    assert found[0] == FEWEST
    assert found[-1] == len(account)
    assert all(1 < b / a < 1.5 for a, b in itertools.pairwise(found))


def test_a_walk_tells_a_subject_from_everything(logs):
    before = logs[0]
    known, pool = Map(before.prompts), subjects(60, 40)
    place = {prompt: i for i, prompt in enumerate(before.prompts)}
    stays = np.array([place[prompt] for prompt in pool.prompts[:120] if prompt in place])
    draw = np.random.Generator(np.random.PCG64(0))
    jumps = draw.choice(len(before.prompts), len(stays), replace=False)
    a, b = (known.walk(path, known.vectors) for path in (stays, jumps))
    for name in ("onward", "narrow", "apart"):
        assert a[name] > 5 * abs(b[name])
    assert known.walk(np.repeat(stays, 2), known.vectors)["repeated"] == 0.5


def test_an_interval_of_a_rate_is_exact():
    assert Rate(0, 100).interval() == pytest.approx((0, 0.0362), abs=1e-4)
    assert Rate(5, 100).interval() == pytest.approx((0.0164, 0.1128), abs=1e-4)
    assert Rate(100, 100).interval()[1] == 1


def test_the_command_prints_alarms_and_how_good_they_are(logs, capsys):
    folder = logs[3]
    command = [str(folder / "now.sqlite"), "--before", str(folder / "before.sqlite")]
    assert extraction.main([*command, "--score"]) == 0
    printed = capsys.readouterr().out
    assert "accounts of one program" in printed
    assert "nobody was suspended" in printed
    assert re.search(r"naive +100\.0% .* +100\.0% ", printed)
    assert extraction.main([str(folder / "nothing.sqlite"), "--before", command[0]]) == 2
    (folder / "text.sqlite").write_text("no database, but longer than a header " * 9)
    assert extraction.main([str(folder / "text.sqlite"), "--before", command[2]]) == 2
    assert "is not a usage log" in capsys.readouterr().err


def test_the_study_tries_every_detector_and_decides_its_claims(logs, tmp_path, capsys):
    folder = logs[3]
    files = []
    for name in ("first", "second"):
        files.append(tmp_path / f"{name}.sqlite")
        for part, source in (("", "now"), (".before", "before")):
            shutil.copy(folder / f"{source}.sqlite", tmp_path / f"{name}{part}.sqlite")
        shutil.copy(folder / "now.labels.json", tmp_path / f"{name}.labels.json")
    out = tmp_path / "extraction.json"
    assert detection.main([*map(str, files), "--out", str(out)]) == 0
    found = json.loads(out.read_text("utf-8"))
    assert found["logs"] == 2
    assert list(found["detectors"]) == list(DETECTORS)
    naive = found["detectors"]["counterparts"]["rates"][AS_IT_GOES]["naive"]
    assert naive["found"] == naive["of"] == 12
    assert len(found["claims"]) == len(WANTED) + 4
    assert "supported: half of the naive extractors have fewer" in capsys.readouterr().out
    assert found["left_out"]["all"]["found"] >= found["left_out"]["mixed"]["found"]
    files[0].with_suffix(".labels.json").unlink()
    assert detection.main([str(files[0])]) == 2
    assert "who was what is known of made-up traffic only" in capsys.readouterr().err


def test_a_kind_that_was_left_out_of_training_is_looked_for_alone(logs):
    before, log, kinds, _ = logs
    rate = seen_attacks([(before, log, kinds), (before, log, kinds)], "naive")
    assert rate.total == 2 * sum(kind == "naive" for kind in kinds.values())


def test_logs_are_counted_together(logs, watch, alarms):
    one = scored(watch, logs[1], alarms, logs[2])
    both = together([one, one])
    assert both.rates[AT_THE_END]["customers"].total == 2 * one.rates[AT_THE_END]["customers"].total
    assert len(both.tokens["naive"]) == 2 * len(one.tokens["naive"])
    assert both.auc == one.auc


def test_what_is_watched_is_recorded_for_the_owner(logs, alarms, monkeypatch, capsys):
    folder = logs[3]

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction.time, "sleep", stop)
    command = [str(folder / "now.sqlite"), "--before", str(folder / "before.sqlite")]
    assert extraction.main([*command, "--watch", "5"]) == 130
    store = Store(folder / "now.sqlite")
    shown = {row["id"]: row["alarms"] for row in store.activity() if row["alarms"]}
    assert {one.account for one in alarms if not one.members} <= shown.keys()
    assert {row["status"] for row in store.accounts()} == {"active"}
    store.close()
