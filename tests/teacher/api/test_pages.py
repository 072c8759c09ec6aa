"""The pages of a server, in headless Chromium."""

import httpx2
import pytest

from teacher.api.pages import OWNER
from tests.browser import opened, problems_of
from tests.serving import PASSWORD, small_teacher

OWNERS = (OWNER, PASSWORD)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with small_teacher(tmp_path_factory.mktemp("pages")) as teacher:
        account, key = teacher.store.add_account("<b>A & B</b>", "text")
        teacher.account, teacher.key = account, key
        yield teacher


def test_a_key_shows_its_usage_and_its_bill_and_answers_a_prompt(served):
    with opened(served.home) as page:
        page.fill("#key", served.key)
        page.fill("#prompt", "lead")
        page.click("text=Ask")
        page.wait_for_selector("#try-note:has-text('out')")
        answer = page.text_content("#answer")
        page.click("text=Show my usage and bill")
        page.wait_for_selector("#usage tr")
        bill = page.text_content("#account-note")
    used = served.store.usage_of(served.account)[-1]
    assert answer == served.store.database.execute("SELECT answer FROM contents").fetchone()[0]
    assert bill.startswith("<b>A & B</b>, tier text, terms version 1: 1 requests, ")
    assert f"{used['prompt_tokens']} tokens in, {used['completion_tokens']} out" in bill


def test_a_wrong_key_is_said_where_it_was_typed(served):
    with opened(served.home, expected="401") as page:
        page.fill("#key", "sk-lab-wrong")
        page.click("text=Show my usage and bill")
        page.wait_for_selector("#account-note.problem")
        assert "not known" in page.text_content("#account-note")


def test_terms_and_tiers_are_public_and_no_key_is_in_the_page(served):
    text = httpx2.get(served.home).text
    assert "No training." in text
    assert "top20-bulk" in text
    assert "internal" not in text
    assert served.key not in text


def test_the_owner_sees_accounts_and_traffic_and_suspends_with_one_click(served):
    service, store = served.service, served.store
    store.finish(
        store.begin(
            service.account(f"Bearer {served.key}"), 100, endpoint="/v1/completions", model="small",
            stream=0, prompt_tokens=60,
        ),
        40,
    )  # fmt: skip
    with opened(f"{served.home}admin", OWNERS) as page:
        page.wait_for_selector("#accounts tr")
        assert page.text_content("#accounts tr td:nth-child(2)") == "<b>A & B</b>"
        assert page.locator("#traffic rect").count() >= 1
        assert page.text_content("#traffic-note").startswith("Tokens per ")
        page.click("text=suspend")
        page.wait_for_selector("text=activate")
        assert store.require_account(served.account)["status"] == "suspended"
        page.click("text=activate")
        page.wait_for_selector("text=suspend")
    assert store.require_account(served.account)["status"] == "active"


@pytest.mark.parametrize("path", ["admin", "admin/data"])
def test_nobody_else_sees_the_accounts(path, served):
    url = f"{served.home}{path}"
    assert httpx2.get(url).status_code == 401
    assert httpx2.get(url, auth=(OWNER, "guess")).status_code == 401
    assert httpx2.get(url, auth=OWNERS).status_code == 200
    rebound = httpx2.get(url, auth=OWNERS, headers={"host": "evil.example"})
    assert rebound.status_code == 403


def test_another_site_cannot_make_the_owners_browser_suspend(served):
    url = f"{served.home}admin/accounts/{served.account}"
    body = {"status": "suspended"}
    assert httpx2.post(url, auth=OWNERS, json=body).status_code == 403
    assert httpx2.post(url, json=body, headers={"x-lab-admin": "1"}).status_code == 401
    headers = {"x-lab-admin": "1"}
    for_good = httpx2.post(url, auth=OWNERS, json={"status": "revoked"}, headers=headers)
    assert for_good.status_code == 422
    assert served.store.require_account(served.account)["status"] == "active"
    unknown = f"{served.home}admin/accounts/acct-0"
    assert httpx2.post(unknown, auth=OWNERS, json=body, headers=headers).status_code == 404


@pytest.mark.parametrize("path", ["", "admin"])
def test_pages_pass_axe_at_three_widths_and_in_the_dark(path, served):
    assert problems_of(f"{served.home}{path}", OWNERS if path else None) == []
