"""Accounts, keys, quotas and the usage log."""

import sqlite3

import pytest

from configs.schema import LabError
from teacher.access import ACCESS
from teacher.api.store import DAY, SUSPENDED, Store
from teacher.api.tiers import PER_MILLION, TIERS


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = Store(tmp_path / "api.sqlite", clock)
    store.publish_terms("1", "No training.", "no")
    yield store
    store.close()


ASKED = {"model": "m", "endpoint": "/v1/chat/completions", "stream": 0, "prompt_tokens": 10}


def test_a_key_is_shown_once_and_stored_as_its_hash(store, tmp_path):
    account, key = store.add_account("A reader", "top5")
    found = store.account_of(key)
    assert (found.id, found.tier_name, found.terms) == (account, "top5", "1")
    store.close()
    for file in tmp_path.iterdir():
        assert key.encode() not in file.read_bytes()


def test_a_rotated_key_replaces_the_old_one(store):
    account, old = store.add_account("A reader", "text")
    new = store.rotate_key(account)
    assert store.account_of(old) is None
    assert store.account_of(new).id == account
    assert store.account_of(new + "x") is None
    assert store.account_of("") is None


def test_a_revoked_account_stays_revoked(store):
    account, key = store.add_account("A reader", "text")
    store.set_status(account, SUSPENDED)
    assert store.account_of(key).status == SUSPENDED
    store.set_status(account, "revoked")
    with pytest.raises(LabError, match="is revoked; add a new one"):
        store.set_status(account, "active")
    with pytest.raises(LabError, match="no account 'nobody'"):
        store.set_status("nobody", "active")


def test_no_account_without_terms(tmp_path):
    with pytest.raises(LabError, match="no terms are published yet"):
        Store(tmp_path / "empty.sqlite").add_account("A reader", "text")


def test_a_quota_holds_what_is_reserved_and_gets_back_what_was_not_used(store, clock):
    account = store.account_of(store.add_account("A reader", "text")[1])
    quota = account.tier.tokens_per_day
    first = store.begin(account, quota - 50, **ASKED)
    assert store.begin(account, 51, **ASKED) is None
    second = store.begin(account, 50, **ASKED)
    assert store.begin(account, 1, **ASKED) is None
    store.finish(first, 20)
    assert store.tokens_since(account.id, 0) == 10 + 20 + 50
    store.finish(second, 40)
    assert store.tokens_since(account.id, 0) == 10 + 20 + 10 + 40
    assert store.begin(account, quota - 80, **ASKED)
    assert store.begin(account, 1, **ASKED) is None
    clock.now += DAY + 60
    assert store.begin(account, quota, **ASKED)


def test_a_request_is_charged_once(store):
    tier = TIERS["top5"]
    account = store.account_of(store.add_account("A reader", "top5")[1])
    request = store.begin(account, 100, **ASKED)
    assert store.bill_of(account.id)["requests"] == 0  # it is still running
    store.finish(request, 30, finish_reason="stop", content=("asked", "answered", 60))
    store.finish(request, 99)
    expected = round((10 * tier.price_in + 30 * tier.price_out) * PER_MILLION)
    assert store.bill_of(account.id) == {
        "requests": 1, "prompt_tokens": 10, "completion_tokens": 30, "cost": expected,
    }  # fmt: skip
    (row,) = store.usage_of(account.id)
    assert (row["status"], row["finish_reason"], row["completion_tokens"]) == ("done", "stop", 30)


def test_what_a_killed_server_left_is_closed_at_no_cost(store, tmp_path, clock):
    account = store.account_of(store.add_account("A reader", "text")[1])
    store.begin(account, 1_000, **ASKED)
    store.finish(store.begin(account, 100, **ASKED), 5)
    store.close()
    again = Store(tmp_path / "api.sqlite", clock)
    assert again.close_interrupted() == 1
    assert again.close_interrupted() == 0
    assert sorted(row["status"] for row in again.usage_of(account.id)) == ["done", "interrupted"]
    assert again.tokens_since(account.id, 0) == 15
    assert again.bill_of(account.id)["completion_tokens"] == 5
    again.close()


def test_prompts_and_answers_are_forgotten_when_their_time_is_over(store, clock):
    account = store.account_of(store.add_account("A reader", "text")[1])
    for seconds in (60.0, 600.0):
        store.finish(store.begin(account, 50, **ASKED), 1, content=("asked", "answer", seconds))
    clock.now += 61
    assert store.forget() == 1
    assert store.forget() == 0
    assert store.forget(before=float("inf")) == 1
    assert len(store.usage_of(account.id)) == 2  # the log has no text, and stays


def test_tiers_name_levels_of_access():
    assert {tier.access for tier in TIERS.values()} <= set(ACCESS)
    assert TIERS["top5"].most_alternatives(72) == 5
    assert TIERS["top20"].most_alternatives(9) == 9
    assert TIERS["open"].most_alternatives(72) == 72
    assert TIERS["text"].most_alternatives(72) == 0


def test_bills_are_whole_numbers():
    for tier in TIERS.values():
        assert isinstance(tier.cost(3, 7), int)
        assert tier.cost(1, 1) * 1000 == tier.cost(1000, 1000)


def test_the_log_keeps_no_text(store):
    columns = {row[1] for row in store.database.execute("PRAGMA table_info(usage)")}
    assert {"prompt_hash", "simhash", "ip_hash", "user_agent", "terms"} <= columns
    assert not columns & {"prompt", "answer", "key"}
    assert isinstance(store.database, sqlite3.Connection)
