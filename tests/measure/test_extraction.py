"""Alarms over a usage log: customers are left alone, and who extracts is found."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import betabinom

from configs.schema import LabError
from measure import detection, extraction
from measure.alarms import FINAL, LINKED, SEQUENTIAL, Monitor
from measure.detection import CLAIMED, combined, scored, supervised
from measure.detectors import DETECTORS
from measure.rates import Rate
from measure.usage import FEWEST, Log, PromptSpace, checkpoints, read_log, text_of
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
def monitor(logs):
    return Monitor(logs[0])


@pytest.fixture(scope="module")
def alarms(logs, monitor):
    return [*monitor.alarms(logs[1])]


def test_customers_are_left_alone_and_extractors_found(logs, monitor, alarms):
    found = scored(monitor, logs[1], alarms, logs[2]).rates
    assert found[SEQUENTIAL]["naive"].share == 1
    assert found[FINAL]["throttled"].share >= 0.75
    assert found[LINKED]["hydra"].share == 1
    for rule in (SEQUENTIAL, FINAL):
        assert found[rule]["customers"].share <= 0.03


def test_an_alarm_comes_while_the_extraction_goes_on(logs, monitor, alarms):
    found = scored(monitor, logs[1], alarms, logs[2])
    tokens = found.tokens["naive"]
    assert found.auc > 0.85
    whole = [one.tokens.sum() for one in logs[1].accounts if logs[2][one.name] == "naive"]
    assert 0 < np.median(tokens) < 0.6 * np.median(whole)


@pytest.fixture(scope="module")
def customers(logs):
    """Two logs of other customers, of the same length as that before."""
    found = []
    for seed in (11, 12):
        file = logs[3] / f"customers-{seed}.sqlite"
        write_usage_log(file, subjects(60, 40), 200, 0, 3, seed=seed)
        found.append(read_log(file))
    return found


@pytest.mark.parametrize("detector", DETECTORS)
def test_customers_exceed_a_threshold_at_its_rate(detector, logs, customers):
    """Whatever the detector: the count of false alarms is beta-binomial, as the threshold is drawn,
    too."""
    monitor = Monitor(logs[0], detector, false_alarms=0.1)
    known = len(monitor.calibration[FINAL])
    found = [one for log in customers for one in monitor.alarms(log)]
    judged = sum(len(log.scored) for log in customers)
    rank = int(0.1 * (known + 1))
    for rule in (SEQUENTIAL, FINAL):
        count = sum(one.rule == rule for one in found)
        low, high = betabinom.ppf([0.0005, 0.9995], judged, rank, known + 1 - rank)
        ties = detector == "volume"  # of whole numbers: fewer exceed them
        assert (0 if ties else low) <= count <= high


def test_alarms_stay_at_their_rate_however_often_a_log_is_read(logs, customers):
    """The final score of an account that goes on is not compared with finished ones."""
    monitor, flagged = Monitor(logs[0], false_alarms=0.05), set()
    log = customers[0]
    for share in np.linspace(0.1, 1, 10):
        seen = [one.first(max(1, int(share * len(one)))) for one in log.accounts]
        rules = (SEQUENTIAL,)
        flagged |= {one.account for one in monitor.alarms(Log(seen, log.prompts), rules)}
    once = {one.account for one in monitor.alarms(log) if one.rule == SEQUENTIAL}
    assert len(flagged - once) <= 2  # a last score between checkpoints
    assert len(flagged) <= betabinom.ppf(0.999, len(log.scored), 6, 114)


def test_nothing_is_learned_from_who_was_what(logs, alarms, monitor):
    """Other names, the same alarms."""
    log = logs[1]
    renamed = type(log)([replace(a, name=f"x{i}") for i, a in enumerate(log.accounts)], log.prompts)
    same = [(one.rule, one.at, one.p) for one in monitor.alarms(renamed)]
    assert same == [(one.rule, one.at, one.p) for one in alarms]


def test_too_few_customers_are_no_ground_for_an_alarm(logs):
    few = type(logs[0])(logs[0].accounts[:50], logs[0].prompts)
    with pytest.raises(LabError, match=r"a rate of 0\.01 false alarms needs 198"):
        Monitor(few)


def test_checkpoints_grow_with_the_requests(logs):
    account = max(logs[1].accounts, key=len)
    found = checkpoints(account)
    assert found[0] == FEWEST
    assert found[-1] == len(account)
    assert all(1 < b / a < 1.5 for a, b in itertools.pairwise(found))


def test_sequence_features_tell_a_subject_from_everything(logs):
    before = logs[0]
    space, pool = PromptSpace(before.prompts), subjects(60, 40)
    vectors = space.vectors(before.prompts)
    place = {prompt: i for i, prompt in enumerate(before.prompts)}
    stays = np.array([place[prompt] for prompt in pool.prompts[:120] if prompt in place])
    draw = np.random.Generator(np.random.PCG64(0))
    jumps = draw.choice(len(before.prompts), len(stays), replace=False)
    a, b = (space.sequence_features(path, vectors) for path in (stays, jumps))
    for name in ("continuing", "narrow", "distance"):
        assert a[name] > 5 * abs(b[name])
    assert space.sequence_features(np.repeat(stays, 2), vectors)["repeated"] == 0.5


def test_a_prompt_cannot_break_the_reader():
    """A long row of brackets ended the detector with a traceback."""
    for prompt in ("[" * 100_000, "[1, 2]", '{"a": 1}', "null", '[{"content": 3}]'):
        assert text_of(prompt) == prompt
    assert text_of('[{"role": "user", "content": "a"}, {"content": "b"}]') == "a\nb"


def test_requests_that_were_cut_off_count(tmp_path):
    """Hanging up before the last token made an extractor invisible."""
    pool = subjects(10, 20)
    write_usage_log(tmp_path / "log.sqlite", pool, 20, 0, 2, seed=1)
    whole = read_log(tmp_path / "log.sqlite")
    store = Store(tmp_path / "log.sqlite")
    store.database.execute("UPDATE usage SET status = 'disconnected'")
    assert sum(map(len, read_log(tmp_path / "log.sqlite").accounts)) == sum(
        map(len, whole.accounts)
    )
    store.database.execute("UPDATE usage SET completion_tokens = 0")
    store.close()
    assert read_log(tmp_path / "log.sqlite").accounts == []


def test_only_the_last_part_of_a_longer_log_is_compared(logs):
    whole = logs[1]
    latest = read_log(logs[3] / "now.sqlite", 24 * 3600.0)
    assert latest.seconds <= 24 * 3600.0 < whole.seconds
    assert max(a.start[-1] for a in latest.accounts) == max(a.start[-1] for a in whole.accounts)


def test_an_interval_of_a_rate_is_exact():
    assert Rate(0, 100).interval() == pytest.approx((0, 0.0362), abs=1e-4)
    assert Rate(5, 100).interval() == pytest.approx((0.0164, 0.1128), abs=1e-4)
    assert Rate(100, 100).interval()[1] == 1


def test_the_command_prints_alarms_and_how_good_they_are(logs, capsys):
    folder = logs[3]
    command = [str(folder / "now.sqlite"), "--before", str(folder / "before.sqlite")]
    assert extraction.main([*command, "--score"]) == 0
    printed = capsys.readouterr().out
    assert " linked accounts" in printed
    assert "no account was suspended" in printed
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
    naive = found["detectors"]["simulated"]["rates"][SEQUENTIAL]["naive"]
    assert naive["found"] == naive["of"] == 12
    assert len(found["claims"]) == len(CLAIMED) + 4
    assert "supported: half of the naive extractors have fewer" in capsys.readouterr().out
    assert found["supervised"]["all"]["found"] >= found["supervised"]["mixed"]["found"]
    files[0].with_suffix(".labels.json").unlink()
    assert detection.main([str(files[0])]) == 2
    assert "only made-up traffic has labels" in capsys.readouterr().err


def test_a_kind_that_was_left_out_of_training_is_looked_for_alone(logs):
    before, log, kinds, _ = logs
    rate = supervised([(before, log, kinds), (before, log, kinds)], "naive")
    assert rate.total == 2 * sum(kind == "naive" for kind in kinds.values())


def test_logs_are_counted_together(logs, monitor, alarms):
    one = scored(monitor, logs[1], alarms, logs[2])
    both = combined([one, one])
    assert both.rates[FINAL]["customers"].total == 2 * one.rates[FINAL]["customers"].total
    assert len(both.tokens["naive"]) == 2 * len(one.tokens["naive"])
    assert both.auc == one.auc


def test_what_is_watched_is_recorded_for_the_owner(logs, alarms, monkeypatch, capsys):
    folder = logs[3]

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction.time, "sleep", stop)
    command = [str(folder / "now.sqlite"), "--before", str(folder / "before.sqlite")]
    assert extraction.main([*command, "--watch", "5"]) == 130
    assert extraction.main([*command, "--watch", "5", "--score"]) == 2
    store = Store(folder / "now.sqlite")
    shown = {row["id"]: row["alarms"] for row in store.activity() if row["alarms"]}
    assert {one.account for one in alarms if one.rule == SEQUENTIAL} == shown.keys()
    assert {row["status"] for row in store.accounts()} == {"active"}
    store.close()
