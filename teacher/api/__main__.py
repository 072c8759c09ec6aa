"""Sell a teacher's answers: serve it behind accounts, and manage these.

    python -m teacher.api serve runs/quickstart --port 8000
    python -m teacher.api serve --pretrained HuggingFaceTB/SmolLM2-135M-Instruct
    python -m teacher.api account add "A reader" --tier top5     # prints its key, once
    python -m teacher.api account list
    python -m teacher.api account suspend acct-1234abcd          # or activate, revoke, rotate
    python -m teacher.api key runs/mark.json                     # for serve --key
    python -m teacher.api terms --publish terms.txt --version 2 --allows-distillation no
    python -m teacher.api usage acct-1234abcd
    python -m teacher.api bill acct-1234abcd
    python -m teacher.api --database runs/traffic.sqlite traffic runs/text   # a log

Accounts and usage are in one SQLite file, `--database`, by default runs/api.sqlite.
"""

import argparse
import ipaddress
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from configs.command import run_command, sleep_soon
from configs.files import printable, read_text, say, write_atomically
from configs.schema import LabError, Model
from teacher.api.store import ACTIVE, REVOKED, SUSPENDED, Store
from teacher.api.tiers import PER_MILLION, TIERS

if TYPE_CHECKING:  # these import torch, which managing accounts does not need
    import uvicorn

    from tasks.task import Task
    from teacher.api.defence import Defence
    from teacher.api.engine import Engine
    from teacher.api.service import Prompts
    from teacher.api.traffic import Customer, Pool

DATABASE = Path("runs") / "api.sqlite"
LONGEST = 1024  # tokens of a pretrained model's prompt and answer: caches for all slots are kept
POOL = 8_000  # prompts that made-up customers ask
MONDAY = 1_767_571_200.0  # 5 January 2026, when made-up traffic begins
DAY = 24 * 3600.0  # seconds
BEFORE = 1_000  # added to the seed of the customers before
FIRST_TERMS = (
    "You may use the answers for any purpose but one: you may not train a model on them that does "
    "what this one does."
)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return run_command(lambda: options.do(options), "what was answered is in the usage log")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("python -m teacher.api", description=__doc__.splitlines()[0])
    found.add_argument("--database", type=Path, default=DATABASE)
    commands = found.add_subparsers(required=True)

    one = commands.add_parser("serve", help="answer requests, until Ctrl-C")
    one.add_argument("run", nargs="?", help="a run with a trained teacher, e.g. runs/quickstart")
    one.add_argument("--pretrained", metavar="NAME", help="instead: a model's folder or hub id")
    one.add_argument("--host", default="127.0.0.1")
    one.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    one.add_argument("--certificate", type=Path, help="for TLS")
    one.add_argument("--certificate-key", type=Path)
    one.add_argument("--expose-without-tls", action="store_true")
    one.add_argument("--key", type=Path, metavar="FILE", help="of the watermark and canaries")
    one.add_argument("--watermark", type=float, metavar="BIAS", help="mark answers; in nats")
    one.add_argument("--share", type=float, default=1.0, help="of the prompts; the others: plain")
    one.add_argument(
        "--per-account", action="store_true", help="a watermark of its own for every account"
    )
    one.add_argument(
        "--canaries", type=float, default=0.0, metavar="SHARE", help="of the prompts whose answers "
        "tell later which account they were sent to",
    )  # fmt: skip
    one.add_argument(
        "--temperature", type=float, help="of all answers but canaries, whatever is asked for"
    )
    one.add_argument(
        "--decimals", type=int, choices=range(9), help="of the log-probabilities that are shown"
    )
    one.add_argument("--no-admin", action="store_true", help="without the page of all accounts")
    one.add_argument(
        "--end-with-input", action="store_true",
        help="end when standard input does: for programs that start a server",
    )  # fmt: skip
    one.set_defaults(do=serve)

    one = commands.add_parser(
        "key", help="draw a key for a watermark or canaries, and show its commitment"
    )
    one.add_argument("file", type=Path)
    one.set_defaults(do=new_key)

    account = commands.add_parser("account").add_subparsers(required=True)
    one = account.add_parser("add")
    one.add_argument("name")
    one.add_argument("--tier", choices=TIERS, default="text")
    one.set_defaults(do=add)
    account.add_parser("list").set_defaults(do=list_accounts)
    for name, status in (("suspend", SUSPENDED), ("activate", ACTIVE), ("revoke", REVOKED)):
        one = account.add_parser(name)
        one.add_argument("account")
        one.set_defaults(do=set_status, status=status)
    one = account.add_parser("rotate", help="a new key; the old one stops working")
    one.add_argument("account")
    one.set_defaults(do=rotate)

    one = commands.add_parser("terms", help="show the terms, or publish new ones")
    one.add_argument("--publish", type=Path, metavar="FILE")
    one.add_argument("--version")
    one.add_argument("--allows-distillation", choices=["yes", "no", "unknown"])
    one.set_defaults(do=terms)

    one = commands.add_parser("usage", help="the requests of an account")
    one.add_argument("account", nargs="?")
    one.add_argument("--forget", action="store_true", help="delete all prompts and answers")
    one.set_defaults(do=usage)
    one = commands.add_parser(
        "traffic", help="days of made-up customers and extractors, in minutes"
    )
    one.add_argument("run", help="a run whose teacher they ask, e.g. runs/text")
    one.add_argument("--customers", type=int, default=600)
    one.add_argument("--extractors", type=int, default=18, help="of each of five kinds")
    one.add_argument("--days", type=int, default=5)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument(
        "--before", type=int, default=0, metavar="N",
        help="first a log of N customers alone, into NAME.before.sqlite",
    )  # fmt: skip
    one.add_argument("--sent", type=float, default=0.05, help="share really sent over HTTP")
    one.set_defaults(do=make_traffic)
    one = commands.add_parser("bill", help="what an account has used and owes")
    one.add_argument("account")
    one.set_defaults(do=bill)
    return found


def opened(database: Path, clock: Callable[[], float] = time.time) -> Store:
    """The store; the first one has terms."""
    database.parent.mkdir(parents=True, exist_ok=True)
    store = Store(database, clock)
    try:
        store.current_terms()
    except LabError:
        store.publish_terms("1", FIRST_TERMS, "no")
    return store


def serve(options: argparse.Namespace) -> int:
    require_safe_address(options)
    sleep_soon()  # before torch is imported
    import uvicorn

    from teacher.api.app import create_app
    from teacher.api.pages import OWNER, add_pages
    from teacher.api.service import Service
    from teacher.watermark import require_table

    if bool(options.run) == bool(options.pretrained):
        raise LabError("serve what? Name a run, as in serve runs/quickstart, or --pretrained NAME")
    teacher = pretrained(options.pretrained) if options.pretrained else teacher_of(options.run)
    defence = defence_of(options)
    if options.watermark is not None:
        require_table(teacher.prompts.vocabulary)
    store = opened(options.database)
    left = store.close_interrupted()
    if left:
        say(f"{left} requests were interrupted when the last server ended; they cost nothing")
    service = Service(store, teacher.engine, teacher.prompts, teacher.name, defence)
    app, password = create_app(service, secrets.token_bytes(16)), secrets.token_urlsafe(9)
    add_pages(app, service, None if options.no_admin else password, teacher.example)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning",
            ssl_certfile=options.certificate, ssl_keyfile=options.certificate_key,
        )
    )  # fmt: skip
    if options.end_with_input:
        threading.Thread(target=end_with_input, args=(server,), daemon=True).start()
    with listening(options.host, options.port) as listener:
        scheme = "https" if options.certificate else "http"
        address = f"{scheme}://{options.host}:{listener.getsockname()[1]}/v1"
        say(f"model {teacher.name} at {address} , accounts in {options.database}; Ctrl-C ends it")
        if not options.no_admin:
            here = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/admin"
            say(f"accounts at {here} , user {OWNER}, password {password}")
        sys.stdout.flush()  # whoever started this waits for the address
        with suppress(KeyboardInterrupt):  # Ctrl-C has ended it in order
            server.run(sockets=[listener])
    teacher.engine.close()
    return 0


def end_with_input(server: "uvicorn.Server") -> None:
    sys.stdin.read()
    server.should_exit = True


@dataclass(frozen=True)
class Teacher:
    """What is sold, under which name; task: None of a pretrained model."""

    name: str
    engine: "Engine"
    prompts: "Prompts"
    task: "Task | None" = None

    @property
    def example(self) -> str:
        return self.task.examples[0] if self.task and self.task.examples else ""


def teacher_of(folder: str) -> Teacher:
    """A run's teacher, ready to answer. LabError if it is not trained or does not answer text."""
    from experiment.experiment import open_task, open_teacher, teacher_task
    from experiment.run import Run
    from teacher.api.engine import Engine
    from teacher.api.prompts import TaskPrompts

    run = Run(Path(folder)).reload()
    config = run.config()
    if not run.stage_done("teacher"):
        raise LabError(f"{run.folder} has no trained teacher yet; run train.py on its config")
    if config.sold_elsewhere:
        raise LabError(f"the teacher of {run.folder} is behind an endpoint; there is none to serve")
    task = open_task(run, config)
    if task.tokenizer is None:
        raise LabError(f"task {task.name} has images; only text can be served")
    task = teacher_task(config, run, task)
    use_threads()
    engine = Engine(open_teacher(run, task), task)
    return Teacher(config.name, engine, TaskPrompts(task), task)


def pretrained(name: str) -> Teacher:
    """A pretrained model, ready to answer. LabError if it cannot be loaded."""
    from models.language import use_one_end_mark
    from models.pretrained import load_pretrained, tokenizer_of
    from teacher.api.engine import Engine
    from teacher.api.prompts import TokenizerPrompts

    settings = Model(pretrained=name)
    model, tokenizer = load_pretrained(settings).eval(), tokenizer_of(settings)
    use_one_end_mark(model, tokenizer.eos_token_id)
    most = getattr(model.config, "max_position_embeddings", None) or LONGEST
    prompts = TokenizerPrompts(tokenizer, min(most, LONGEST))
    use_threads()
    return Teacher(Path(name).name, Engine(model, prompts), prompts)


def use_threads() -> None:
    """All but one, which answers requests."""
    import psutil
    import torch

    torch.set_num_threads(max(1, min(8, (psutil.cpu_count(logical=False) or 1) - 1)))


def listening(host: str, port: int) -> socket.socket:
    """A socket of an address. LabError if it cannot be had."""
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise LabError(
            f"cannot listen at {host}:{port} ({error.strerror}); choose another --port"
        ) from None


def require_safe_address(options: argparse.Namespace) -> None:
    """LabError if keys would travel in the clear."""
    try:
        local = ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        local = options.host == "localhost"
    if not (local or options.certificate or options.expose_without_tls):
        raise LabError(
            f"--host {options.host} is reachable from elsewhere, and keys would travel in the "
            "clear; add --certificate and --certificate-key, or --expose-without-tls"
        )


def defence_of(options: argparse.Namespace) -> "Defence":
    from teacher.api.defence import Defence
    from teacher.watermark import read_key

    if (options.watermark or options.canaries) and not options.key:
        raise LabError(
            "--watermark and --canaries need a key: --key FILE; python -m teacher.api key FILE "
            "draws one"
        )
    if options.key and options.watermark is None and not options.canaries:
        raise LabError("--key does nothing by itself: add --watermark BIAS or --canaries SHARE")
    if options.watermark is None and (options.per_account or options.share != 1):
        raise LabError("--per-account and --share belong to a watermark: add --watermark BIAS")
    for name in ("share", "canaries"):
        if not 0 <= getattr(options, name) <= 1:
            raise LabError(f"--{name} {getattr(options, name):g}: expected a share, from 0 to 1")
    for name in ("watermark", "temperature"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 20:
            raise LabError(f"--{name} {value:g}: expected a number from 0 to 20")
    return Defence(
        key=read_key(options.key) if options.key else None,
        bias=options.watermark or 0.0,
        share=options.share,
        per_account=options.per_account,
        canaries=options.canaries,
        temperature=options.temperature,
        decimals=options.decimals,
    )


def new_key(options: argparse.Namespace) -> int:
    from teacher.watermark import commitment, read_key, write_key

    if options.file.exists():
        say(f"{options.file} exists; its commitment is {commitment(read_key(options.file))}")
        return 0
    committed = write_key(options.file)
    say(
        f"{options.file} holds the key; keep it secret\ncommitment {committed}\nPublish that "
        "before anybody is taught: it shows that the key was not chosen afterwards."
    )
    return 0


def add(options: argparse.Namespace) -> int:
    account, key = opened(options.database).add_account(printable(options.name), options.tier)
    say(f"account {account}, tier {options.tier}\nkey     {key}\nThe key is shown only now.")
    return 0


def list_accounts(options: argparse.Namespace) -> int:
    for row in opened(options.database).accounts():
        say(f"{row['id']}  {row['status']:<9}  {row['tier']:<8}  {row['name']}")
    return 0


def set_status(options: argparse.Namespace) -> int:
    opened(options.database).set_status(options.account, options.status)
    say(f"account {options.account} is {options.status}")
    return 0


def rotate(options: argparse.Namespace) -> int:
    key = opened(options.database).rotate_key(options.account)
    say(f"key     {key}\nThe key is shown only now.")
    return 0


def terms(options: argparse.Namespace) -> int:
    store = opened(options.database)
    if options.publish:
        if not (options.version and options.allows_distillation):
            raise LabError("--publish needs --version and --allows-distillation")
        store.publish_terms(
            options.version, read_text(options.publish), options.allows_distillation
        )
    row = store.current_terms()
    say(f"version {row['version']}, allows distillation: {row['allows_distillation']}")
    say(row["text"])
    return 0


def usage(options: argparse.Namespace) -> int:
    store = opened(options.database)
    if options.forget:
        say(f"{store.forget(before=float('inf'))} prompts and answers deleted")
        return 0
    if not options.account:
        raise LabError("name an account; python -m teacher.api account list shows them")
    store.require_account(options.account)
    for row in store.usage_of(options.account):
        start = datetime.fromtimestamp(row["start"], UTC).isoformat(timespec="seconds")
        used = row["completion_tokens"] if row["completion_tokens"] is not None else "-"
        say(f"{start}  {row['endpoint']}  {row['prompt_tokens']} + {used} tokens  {row['status']}")
    return 0


def make_traffic(options: argparse.Namespace) -> int:
    """Into new databases, so that nobody's bill grows; who was what is written beside them."""
    before = options.database.with_suffix(".before.sqlite")
    wanted = {options.database: (options.customers, options.extractors, options.seed)}
    if options.before:
        wanted = {before: (options.before, 0, options.seed + BEFORE), **wanted}
    for database in wanted:
        if database.exists():
            raise LabError(f"{database} exists; name another --database for made-up traffic")
    sleep_soon()
    from teacher.api.traffic import Pool, population

    teacher = teacher_of(options.run)
    pool = Pool.of(teacher.task, teacher.task.rows("train"), POOL)
    for database, (customers, extractors, seed) in wanted.items():
        people = population(pool, customers, extractors, options.days, seed)
        start = MONDAY if database is options.database else MONDAY - options.days * DAY
        write_traffic(teacher, pool, people, database, start, options.sent)
    teacher.engine.close()
    return 0


def write_traffic(
    teacher: Teacher, pool: "Pool", people: list["Customer"], database: Path, start: float,
    sent: float,
) -> None:  # fmt: skip
    import asyncio
    import json

    from tqdm import tqdm

    from teacher.api.replay import Clock, play
    from teacher.api.service import Service

    clock = Clock(start)
    store = opened(database, clock)
    service = Service(store, teacher.engine, teacher.prompts, teacher.name)
    accounts = [store.add_account(f"Customer {n}", one.tier) for n, one in enumerate(people)]
    keys = [key for _, key in accounts]
    total = sum(len(one.asks) for one in people)
    with tqdm(total=total, unit="request", ascii=True, disable=None) as bar:
        asyncio.run(play(service, clock, people, keys, pool, sent, bar.update))
    store.close()
    labels = {
        account: {"kind": one.kind, "ring": one.ring}
        for (account, _), one in zip(accounts, people, strict=True)
    }
    file = database.with_suffix(".labels.json")
    write_atomically(file, json.dumps(labels, indent=1) + "\n")
    say(
        f"{total:,} requests of {len(people)} accounts in {database}\nwho was what in "
        f"{file}, which no detector may read"
    )


def bill(options: argparse.Namespace) -> int:
    store = opened(options.database)
    tier = store.require_account(options.account)["tier"]
    found = store.bill_of(options.account)
    price = TIERS[tier]
    money = found["cost"] / PER_MILLION**2
    say(
        f"{found['requests']} requests, {found['prompt_tokens']:,} tokens in at {price.price_in:g} "
        f"and {found['completion_tokens']:,} out at {price.price_out:g} USD per million: "
        f"{money:.6f} USD"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
