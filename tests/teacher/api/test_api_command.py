"""`python -m teacher.api`, as a seller of answers types it."""

import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import psutil
import pytest

from configs.schema import LabError
from teacher.api import __main__ as command
from teacher.api.defence import Defence
from teacher.api.store import Store
from teacher.api.traffic import ATTACKS
from teacher.watermark import commitment, read_key
from tests.helpers import ROOT


@pytest.fixture
def api(tmp_path, capsys):
    """Runs a command; its exit code and what it printed."""

    def run(*arguments):
        code = command.main(["--database", str(tmp_path / "api.sqlite"), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_an_account_is_added_listed_suspended_and_its_key_replaced(api, tmp_path):
    code, printed, _ = api("account", "add", "A \x1b[31mreader", "--tier", "top5")
    assert code == 0
    account, key = re.findall(r"acct-\w+|sk-lab-[\w-]+", printed)
    store = Store(tmp_path / "api.sqlite")
    assert store.account_of(key).id == account
    assert api("account", "suspend", account)[1] == f"account {account} is suspended\n"
    listed = api("account", "list")[1]
    assert listed.startswith(f"{account}  suspended  top5")
    assert "\x1b" not in listed
    (new,) = re.findall(r"sk-lab-[\w-]+", api("account", "rotate", account)[1])
    assert store.account_of(key) is None
    assert store.account_of(new).id == account
    store.close()


def test_terms_are_published_and_shown(api, tmp_path):
    assert "allows distillation: no" in api("terms")[1]
    file = tmp_path / "terms.txt"
    file.write_text("Do what you like.", encoding="utf-8")
    assert "needs --version" in api("terms", "--publish", file)[2]
    code, printed, _ = api(
        "terms", "--publish", file, "--version", 2, "--allows-distillation", "yes"
    )
    assert code == 0
    assert printed == "version 2, allows distillation: yes\nDo what you like.\n"


def test_traffic_goes_into_a_log_of_its_own_and_who_was_what_beside_it(api, tiny_run, tmp_path):
    small = ("--customers", 8, "--extractors", 1, "--days", 1, "--before", 4)
    code, printed, _ = api("traffic", tiny_run, *small)
    assert code == 0
    labels = json.loads((tmp_path / "api.labels.json").read_text(encoding="utf-8"))
    store = Store(tmp_path / "api.sqlite")
    assert {row["id"] for row in store.accounts()} == set(labels)
    rows = store.database.execute("SELECT COUNT(*), SUM(status = 'done') FROM usage").fetchone()
    assert f"{rows[0]:,} requests of {len(labels)} accounts" in printed
    assert rows[0] == rows[1] > 100
    kinds = [label["kind"] for label in labels.values()]
    assert kinds.count("hydra") == 20
    assert kinds.count("chat") == 4
    assert not any(kind in row["name"] for row in store.accounts() for kind in kinds)
    latest, earliest = (
        store.database.execute(f"SELECT {which}(start) FROM usage").fetchone()[0]
        for which in ("MAX", "MIN")
    )
    store.close()
    before = Store(tmp_path / "api.before.sqlite")
    kinds = json.loads((tmp_path / "api.before.labels.json").read_text(encoding="utf-8"))
    assert {row["id"] for row in before.accounts()} == set(kinds)
    assert not {label["kind"] for label in kinds.values()} & {*ATTACKS}
    first = before.database.execute("SELECT MIN(start) FROM usage").fetchone()[0]
    assert first < earliest < latest
    before.close()
    assert "exists; name another" in api("traffic", tiny_run, *small)[2]


def test_a_bill_adds_up(api, tmp_path):
    account, key = re.findall(
        r"acct-\w+|sk-lab-[\w-]+", api("account", "add", "A reader", "--tier", "top20")[1]
    )
    store = Store(tmp_path / "api.sqlite")
    for tokens in (100, 200):
        fields = {"model": "m", "endpoint": "/v1/completions", "stream": 0, "prompt_tokens": 50}
        store.finish(store.begin(store.account_of(key), 300, **fields), tokens)
    store.close()
    assert api("bill", account)[1] == (
        "2 requests, 100 tokens in at 0.1 and 300 out at 0.6 USD per million: 0.000190 USD\n"
    )
    assert api("usage", account)[1].count("/v1/completions  50 + ") == 2
    assert "no account 'acct-0'" in api("usage", "acct-0")[2]
    assert api("usage")[0] == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_keys_do_not_travel_in_the_clear_unless_asked_for(host):
    options = command.parser().parse_args(["serve", "run", "--host", host])
    with pytest.raises(LabError, match="keys would travel in the clear"):
        command.require_safe_address(options)
    for more in (["--expose-without-tls"], ["--certificate", "a.pem"]):
        command.require_safe_address(
            command.parser().parse_args(["serve", "run", "--host", host, *more])
        )
    for safe in ("127.0.0.1", "::1", "localhost"):
        command.require_safe_address(command.parser().parse_args(["serve", "r", "--host", safe]))


def test_a_key_is_written_once_and_committed_to(api, tmp_path):
    code, printed, _ = api("key", tmp_path / "mark.json")
    assert code == 0
    assert commitment(read_key(tmp_path / "mark.json")) in printed
    assert str(read_key(tmp_path / "mark.json").key) not in printed
    code, printed, _ = api("key", tmp_path / "mark.json")
    assert (code, commitment(read_key(tmp_path / "mark.json")) in printed) == (0, True)


def test_what_is_done_to_answers_is_chosen_when_they_are_served(api, tmp_path):
    api("key", tmp_path / "mark.json")
    key = read_key(tmp_path / "mark.json")

    def defence(*arguments):
        return command.defence_of(command.parser().parse_args(["serve", "run", *arguments]))

    assert defence() == Defence()
    marked = ("--key", str(tmp_path / "mark.json"), "--watermark", "2")
    assert defence(*marked) == Defence(key, 2.0)
    assert defence(*marked, "--per-account", "--decimals", "1") == Defence(
        key, 2.0, per_account=True, decimals=1
    )
    more = ("--share", "0.2", "--canaries", "0.1", "--temperature", "0")
    assert defence(*marked, *more) == Defence(key, 2.0, 0.2, False, 0.1, 0.0)
    for one, problem in (
        (("--per-account",), "--per-account and --share belong to a watermark"),
        (("--share", "0.2"), "--per-account and --share belong to a watermark"),
        (marked[:2], "--key does nothing by itself"),
        (("--watermark", "1"), "need a key"),
        (("--canaries", "0.1"), "need a key"),
        ((*marked[:2], "--canaries", "5"), "--canaries 5: expected a share"),
        ((*marked[:2], "--watermark", "-1"), "--watermark -1: expected a number"),
    ):
        with pytest.raises(LabError, match=re.escape(problem)):
            defence(*one)


class Served:
    """The server as a process, which can be killed and started again."""

    def __init__(self, run, database) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [
            sys.executable, "-m", "teacher.api", "--database", str(database), "serve", str(run),
            "--port", str(self.port),
        ]  # fmt: skip

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(self.process.stderr.read().decode())

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        code = self.process.wait(timeout=30)
        self.process.stderr.close()
        return code


def test_a_server_ends_when_the_program_that_started_it_is_killed(tiny_run, tmp_path):
    """It lived on, and kept the port, the memory and the database of a run that was killed."""
    served = Served(tiny_run, tmp_path / "api.sqlite")
    served.command.append("--end-with-input")
    starts_it = f"import subprocess, sys\nserver = subprocess.Popen({served.command!r}, " + (
        "stdin=subprocess.PIPE, stdout=subprocess.PIPE)\nserver.stdout.readline()\n"
        "print(server.pid, flush=True)\nserver.wait()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", starts_it], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    server = psutil.Process(int(starter.stdout.readline()))
    starter.kill()
    starter.communicate()
    server.wait(timeout=30)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_no_row_is_lost_or_doubled_when_the_server_is_killed(kills, tiny_run, tmp_path):
    """Every answer that a client has got is in the log as done, once, with its tokens."""
    database = tmp_path / "api.sqlite"
    store = Store(database)
    store.publish_terms("1", "No training.", "no")
    account, key = store.add_account("A reader", "internal")
    served, told, over = Served(tiny_run, database), {}, threading.Event()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "lead"}], "max_tokens": 20}

    def ask() -> None:
        address = f"http://127.0.0.1:{served.port}/v1/chat/completions"
        with httpx2.Client(headers={"authorization": f"Bearer {key}"}) as client:
            while not over.is_set():
                try:
                    response = client.post(address, json=body, timeout=10)
                    response.raise_for_status()
                except httpx2.HTTPError:
                    time.sleep(0.05)
                    continue
                used = response.json()["usage"]["completion_tokens"]
                told[response.headers["x-request-id"]] = used

    served.start()
    clients = [threading.Thread(target=ask) for _ in range(8)]
    for client in clients:
        client.start()
    moments = random.Random(0)
    for _ in range(kills):
        time.sleep(moments.uniform(0.2, 1.0))
        served.stop(signal.SIGKILL)
        served.start()
    time.sleep(0.5)
    over.set()
    for client in clients:
        client.join()
    assert served.stop(signal.SIGINT) == 0
    store.close_interrupted()
    rows = store.usage_of(account)
    logged = {row["request_id"]: row for row in rows}
    assert len(logged) == len(rows) >= len(told) > 10 * kills
    assert {row["status"] for row in rows} <= {"done", "interrupted", "disconnected"}
    for request_id, used in told.items():
        assert (logged[request_id]["status"], logged[request_id]["completion_tokens"]) == (
            "done",
            used,
        )
    counted = sum(r["prompt_tokens"] + r["completion_tokens"] for r in rows if r["cost"] is not None
                  and r["status"] != "interrupted")  # fmt: skip
    assert store.tokens_since(account, 0) == counted
    store.close()
