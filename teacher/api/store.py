"""Accounts, keys, terms and the usage log, in one SQLite file.

Every request that passes its key, its quota and its limits has one row of usage, written before it
is answered and completed afterwards: a server that is killed leaves rows that are still `running`,
which the next one closes as `interrupted`, at no cost. Keys are shown once and stored as their
sha256.
"""

import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import LabError
from teacher.api.tiers import TIERS, Tier

ACTIVE, SUSPENDED, REVOKED = "active", "suspended", "revoked"
DAY = 24 * 3600.0
VERSION = 3  # of the tables
# {an older version: what it lacks}
SINCE = {
    2: "ALTER TABLE accounts ADD COLUMN share REAL; ALTER TABLE usage ADD COLUMN canary INTEGER; "
    "ALTER TABLE usage ADD COLUMN stops INTEGER;"
}
SCHEMA = """
CREATE TABLE IF NOT EXISTS terms (
    version TEXT PRIMARY KEY, text TEXT NOT NULL, allows_distillation TEXT NOT NULL,
    published REAL NOT NULL);
CREATE TABLE IF NOT EXISTS accounts (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, tier TEXT NOT NULL, status TEXT NOT NULL,
    created REAL NOT NULL, terms TEXT NOT NULL REFERENCES terms, accepted REAL NOT NULL, bias REAL,
    share REAL);
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts, sha256 BLOB NOT NULL UNIQUE,
    created REAL NOT NULL, revoked REAL);
CREATE TABLE IF NOT EXISTS usage (
    request_id TEXT PRIMARY KEY, start REAL NOT NULL, end REAL, account TEXT NOT NULL,
    key_id TEXT NOT NULL, tier TEXT NOT NULL, ip_hash TEXT, user_agent TEXT, model TEXT NOT NULL,
    endpoint TEXT NOT NULL, stream INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    reserved_tokens INTEGER NOT NULL, completion_tokens INTEGER, cost INTEGER, temperature REAL,
    top_p REAL, max_tokens INTEGER, n INTEGER, seed INTEGER, logprobs INTEGER,
    top_logprobs INTEGER, logit_bias INTEGER, prompt_hash TEXT, simhash INTEGER,
    finish_reason TEXT, status TEXT NOT NULL, error_code TEXT, watermark TEXT, policy TEXT,
    terms TEXT, canary INTEGER, stops INTEGER);
CREATE INDEX IF NOT EXISTS usage_of_account ON usage (account, start);
CREATE INDEX IF NOT EXISTS running ON usage (status) WHERE status = 'running';
CREATE TABLE IF NOT EXISTS meter (
    account TEXT NOT NULL, minute INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (account, minute)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contents (
    request_id TEXT PRIMARY KEY, prompt TEXT NOT NULL, answer TEXT NOT NULL, expires REAL NOT NULL);
CREATE TABLE IF NOT EXISTS alarms (
    account TEXT NOT NULL REFERENCES accounts, rule TEXT NOT NULL, at REAL NOT NULL,
    p REAL NOT NULL, PRIMARY KEY (account, rule)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Account:
    """Who asks. key_id names a key in the log; the key itself is nowhere."""

    id: str
    name: str
    tier_name: str
    status: str
    terms: str
    key_id: str
    bias: float | None = None  # of its watermark; None: the server's
    share: float | None = None  # of its prompts whose answers are marked; None: the server's

    @property
    def tier(self) -> Tier:
        return TIERS[self.tier_name]


class Store:
    """clock: seconds since the epoch; another one replays the traffic of days in minutes."""

    def __init__(self, file: Path | str, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self.database.row_factory = sqlite3.Row
        self.database.execute("PRAGMA journal_mode = WAL")
        self.database.execute("PRAGMA synchronous = NORMAL")
        self.database.execute("PRAGMA busy_timeout = 10000")
        if self.database.execute("SELECT name FROM sqlite_master").fetchone():
            (version,) = self.database.execute("PRAGMA user_version").fetchone()
            if version in SINCE:
                self.database.executescript(f"{SINCE[version]} PRAGMA user_version = {VERSION};")
            elif version != VERSION:
                self.database.close()
                raise LabError(
                    f"{file} is a database of version {version}, expected {VERSION}; move it "
                    "elsewhere"
                )
        self.database.executescript(f"{SCHEMA} PRAGMA user_version = {VERSION};")

    def close(self) -> None:
        self.database.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield self.database
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    # -- accounts and keys -------------------------------------------------------------------------

    def publish_terms(self, version: str, text: str, allows_distillation: str) -> None:
        self.database.execute(
            "INSERT INTO terms VALUES (?, ?, ?, ?)",
            (version, text, allows_distillation, self.clock()),
        )

    def current_terms(self) -> sqlite3.Row:
        """LabError if none were published."""
        found = self.database.execute(
            "SELECT * FROM terms ORDER BY published DESC, rowid DESC LIMIT 1"
        ).fetchone()
        if found is None:
            raise LabError("no terms are published yet: run python -m teacher.api terms --publish")
        return found

    def terms(self, version: str) -> sqlite3.Row:
        return self.database.execute("SELECT * FROM terms WHERE version = ?", (version,)).fetchone()

    def add_account(
        self, name: str, tier: str, bias: float | None = None, share: float | None = None
    ) -> tuple[str, str]:
        """(id of the account, its key, which is shown only now). bias, share: see Account."""
        account = f"acct-{secrets.token_hex(4)}"
        with self.transaction() as database:
            database.execute(
                "INSERT INTO accounts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (account, name, tier, ACTIVE, self.clock(), self.current_terms()["version"],
                 self.clock(), bias, share),
            )  # fmt: skip
            key = self.new_key(account)
        return account, key

    def new_key(self, account: str) -> str:
        key = f"sk-lab-{secrets.token_urlsafe(24)}"
        self.database.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, NULL)",
            (f"key-{secrets.token_hex(4)}", account, sha256(key), self.clock()),
        )
        return key

    def rotate_key(self, account: str) -> str:
        """A new key; the old ones stop working."""
        self.require_account(account)
        with self.transaction() as database:
            database.execute(
                "UPDATE keys SET revoked = ? WHERE account = ? AND revoked IS NULL",
                (self.clock(), account),
            )
            return self.new_key(account)

    def set_status(self, account: str, status: str) -> None:
        """LabError for an account that is revoked: that is for good."""
        if self.require_account(account)["status"] == REVOKED:
            raise LabError(f"account {account} is revoked; add a new one")
        self.database.execute("UPDATE accounts SET status = ? WHERE id = ?", (status, account))

    def require_account(self, account: str) -> sqlite3.Row:
        found = self.database.execute("SELECT * FROM accounts WHERE id = ?", (account,)).fetchone()
        if found is None:
            raise LabError(f"no account {account!r}; python -m teacher.api account list shows them")
        return found

    def accounts(self) -> list[sqlite3.Row]:
        return self.database.execute("SELECT * FROM accounts ORDER BY created, id").fetchall()

    def account_of(self, key: str) -> Account | None:
        """Whose key it is, whatever the status of the account; None for an unknown key."""
        digest = sha256(key)
        found = self.database.execute(
            "SELECT accounts.*, keys.id AS key_id, keys.sha256 AS stored FROM keys "
            "JOIN accounts ON accounts.id = keys.account "
            "WHERE keys.sha256 = ? AND keys.revoked IS NULL",
            (digest,),
        ).fetchone()
        if found is None or not hmac.compare_digest(found["stored"], digest):
            return None
        return Account(
            found["id"], found["name"], found["tier"], found["status"], found["terms"],
            found["key_id"], found["bias"], found["share"],
        )  # fmt: skip

    # -- usage -------------------------------------------------------------------------------------

    def tokens_since(self, account: str, start: float) -> int:
        """Tokens used, and reserved by requests that are running, to the minute."""
        found = self.database.execute(
            "SELECT SUM(tokens) FROM meter WHERE account = ? AND minute >= ?",
            (account, int(start // 60)),
        ).fetchone()
        return found[0] or 0

    def count(self, account: str, start: float, tokens: int) -> None:
        """Add tokens to the minute in which a request began. A sum over all requests of a day would
        take longer with each of them."""
        self.database.execute(
            "INSERT INTO meter VALUES (?, ?, ?) "
            "ON CONFLICT (account, minute) DO UPDATE SET tokens = tokens + excluded.tokens",
            (account, int(start // 60), tokens),
        )

    def begin(self, account: Account, reserved_tokens: int, **fields: Any) -> str | None:
        """Reserve tokens of the day's quota and write the row; its request id. None if the quota
        does not hold so many: checked and reserved in one transaction."""
        request_id = f"req-{secrets.token_hex(12)}"
        quota = account.tier.tokens_per_day
        with self.transaction() as database:
            used = self.tokens_since(account.id, self.clock() - DAY) if quota else 0
            if quota and used + reserved_tokens > quota:
                return None
            row = {
                "request_id": request_id, "start": self.clock(), "account": account.id,
                "key_id": account.key_id, "tier": account.tier_name, "terms": account.terms,
                "reserved_tokens": reserved_tokens, "status": "running", **fields,
            }  # fmt: skip
            self.count(account.id, row["start"], reserved_tokens)
            names = ", ".join(row)
            marks = ", ".join("?" * len(row))
            database.execute(f"INSERT INTO usage ({names}) VALUES ({marks})", [*row.values()])
        return request_id

    def finish(
        self,
        request_id: str,
        completion_tokens: int,
        status: str = "done",
        finish_reason: str | None = None,
        error_code: str | None = None,
        content: tuple[str, str, float] | None = None,
    ) -> None:
        """Complete a row that is running, and charge it; a second call changes nothing. content:
        (prompt, answer, seconds until they are forgotten)."""
        with self.transaction() as database:
            row = database.execute(
                "SELECT account, start, tier, prompt_tokens, reserved_tokens FROM usage "
                "WHERE request_id = ? AND status = 'running'",
                (request_id,),
            ).fetchone()
            if row is None:
                return
            used = row["prompt_tokens"] + completion_tokens
            self.count(row["account"], row["start"], used - row["reserved_tokens"])
            database.execute(
                "UPDATE usage SET end = ?, completion_tokens = ?, cost = ?, status = ?, "
                "finish_reason = ?, error_code = ? WHERE request_id = ?",
                (self.clock(), completion_tokens,
                 TIERS[row["tier"]].cost(row["prompt_tokens"], completion_tokens), status,
                 finish_reason, error_code, request_id),
            )  # fmt: skip
            if content:
                prompt, answer, seconds = content
                database.execute(
                    "INSERT INTO contents VALUES (?, ?, ?, ?)",
                    (request_id, prompt, answer, self.clock() + seconds),
                )

    def close_interrupted(self) -> int:
        """Close the rows of a server that was killed, at no cost; how many."""
        with self.transaction() as database:
            rows = database.execute(
                "SELECT account, start, reserved_tokens FROM usage WHERE status = 'running'"
            ).fetchall()
            for row in rows:
                self.count(row["account"], row["start"], -row["reserved_tokens"])
            database.execute(
                "UPDATE usage SET status = 'interrupted', completion_tokens = 0, cost = 0, "
                "end = ? WHERE status = 'running'",
                (self.clock(),),
            )
        return len(rows)

    def latest(self, account: str, count: int) -> list[dict[str, Any]]:
        """The last requests of an account, the latest first, as it may see them itself."""
        found = self.database.execute(
            "SELECT request_id, start, endpoint, prompt_tokens, completion_tokens, status FROM "
            "usage WHERE account = ? ORDER BY start DESC, request_id LIMIT ?",
            (account, count),
        )
        return [dict(row) for row in found]

    def activity(self) -> list[dict[str, Any]]:
        """All accounts, with what each has used and owes."""
        found = self.database.execute(
            "SELECT accounts.id, name, accounts.tier, accounts.status, "
            "COUNT(usage.request_id) AS requests, COALESCE(SUM(cost), 0) AS cost, "
            "COALESCE(SUM(prompt_tokens + COALESCE(completion_tokens, 0)), 0) AS tokens, "
            "(SELECT GROUP_CONCAT(rule, ', ') FROM alarms WHERE account = accounts.id) AS alarms, "
            "MAX(start) AS last FROM accounts LEFT JOIN usage ON usage.account = accounts.id "
            "GROUP BY accounts.id ORDER BY tokens DESC, accounts.created, accounts.id"
        )
        return [dict(row) for row in found]

    def record_alarm(self, account: str, rule: str, at: float, p: float) -> None:
        """What a detector says of an account, for its owner to look at; the first of each rule."""
        self.database.execute(
            "INSERT OR IGNORE INTO alarms VALUES (?, ?, ?, ?)", (account, rule, at, p)
        )

    def traffic(self, since: float) -> list[dict[str, Any]]:
        """Tokens of each account in each minute."""
        found = self.database.execute(
            "SELECT account, minute, tokens FROM meter WHERE minute >= ? AND tokens > 0",
            (int(since // 60),),
        )
        return [dict(row) for row in found]

    def usage_of(self, account: str, since: float = 0.0) -> list[sqlite3.Row]:
        return self.database.execute(
            "SELECT * FROM usage WHERE account = ? AND start > ? ORDER BY start, request_id",
            (account, since),
        ).fetchall()

    def sampled(self, account: str, count: int) -> list[sqlite3.Row]:
        """The first answers to different prompts that were drawn at random for an account, from the
        whole distribution without a mark, and are still stored."""
        whole = "COALESCE(top_p, 1) = 1 AND NOT COALESCE(logit_bias, 0) AND NOT COALESCE(stops, 0)"
        plain = "watermark IS NULL AND NOT COALESCE(canary, 0) AND COALESCE(temperature, 1) > 0"
        return self.stored(account, f"{plain} AND {whole}", count)

    def canaries(self, account: str, count: int) -> list[sqlite3.Row]:
        """The canary answers to the first prompts of an account that are still stored."""
        return self.stored(account, "canary AND NOT COALESCE(stops, 0)", count)

    def stored(self, account: str, condition: str, count: int) -> list[sqlite3.Row]:
        return self.database.execute(
            "SELECT MIN(start) AS first, temperature, max_tokens, finish_reason, prompt, answer "
            "FROM usage JOIN contents USING (request_id) "
            f"WHERE account = ? AND status = 'done' AND n = 1 AND {condition} "
            "GROUP BY prompt ORDER BY first LIMIT ?",
            (account, count),
        ).fetchall()

    def bill_of(self, account: str, since: float = 0.0) -> dict[str, int]:
        """Requests, tokens in and out, and money in the unit of `Tier.cost`."""
        found = self.database.execute(
            "SELECT COUNT(*) AS requests, COALESCE(SUM(prompt_tokens), 0) AS prompt_tokens, "
            "COALESCE(SUM(completion_tokens), 0) AS completion_tokens, "
            "COALESCE(SUM(cost), 0) AS cost FROM usage "
            "WHERE account = ? AND start > ? AND cost IS NOT NULL",
            (account, since),
        ).fetchone()
        return dict(found)

    def forget(self, before: float | None = None) -> int:
        """Delete prompts and answers whose time is over, or will be by then; how many."""
        return self.database.execute(
            "DELETE FROM contents WHERE expires <= ?", (self.clock() if before is None else before,)
        ).rowcount


def sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
