"""The pages of a server: one for its customers, one for its owner, who sees all accounts.

They are one file each, ask nothing of other servers, and run only the script that came with them.
"""

import hmac
import ipaddress
import secrets
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict

from configs.schema import LabError
from teacher.api.errors import ApiError
from teacher.api.service import Service
from teacher.api.tiers import PER_MILLION, TIERS

TEMPLATES = Environment(
    loader=PackageLoader("teacher.api", ""), autoescape=True, undefined=StrictUndefined
)
DAYS_SHOWN = 7 * 24 * 3600.0  # seconds of traffic
OWNER = "owner"  # the user of the admin page
LOCAL = {"127.0.0.1", "localhost", "[::1]"}


class Change(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    status: Literal["active", "suspended"]


def add_pages(app: FastAPI, service: Service, password: str | None, example: str) -> None:
    """password: of the admin page; None for a server without one."""

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> Response:
        vocabulary = service.prompts.vocabulary
        tiers = [
            (name, tier, tier.most_alternatives(vocabulary) or "none")
            for name, tier in TIERS.items()
            if name != "internal"
        ]
        return page(
            "home.html",
            model=service.model,
            terms=service.store.current_terms(),
            tiers=tiers,
            address=f"{request.base_url}v1",
            example=example,
        )

    if password is None:
        return
    owner = Depends(only(password))

    @app.get("/admin", include_in_schema=False, dependencies=[owner])
    async def admin() -> Response:
        return page("admin.html", model=service.model)

    @app.get("/admin/data", include_in_schema=False, dependencies=[owner])
    async def data() -> dict:
        accounts = [
            {**row, "money": row["cost"] / PER_MILLION**2} for row in service.store.activity()
        ]
        since = service.store.clock() - DAYS_SHOWN
        return {"accounts": accounts, "traffic": service.store.traffic(since)}

    @app.post("/admin/accounts/{account}", include_in_schema=False, dependencies=[owner])
    async def change(account: str, body: Change, request: Request) -> dict:
        if request.headers.get("x-lab-admin") is None:  # a form of another page cannot send it
            raise ApiError(403, "forbidden", "this is for the admin page")
        try:
            service.store.set_status(account, body.status)
        except LabError as error:
            raise ApiError(404, "not_found", str(error)) from None
        return {"id": account, "status": body.status}


def page(template: str, templates: Environment = TEMPLATES, **content: object) -> Response:
    """A page that runs only its own script, and asks nothing of other servers."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; "
        f"script-src 'nonce-{nonce}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    headers = {"content-security-policy": policy, "cache-control": "no-store"}
    return HTMLResponse(
        templates.get_template(template).render(nonce=nonce, **content), 200, headers
    )


def only(password: str) -> Callable[..., None]:
    """Lets in who is on this machine, asks for it by a local name (so that no other site's name can
    be made to point here) and knows the password."""
    basic = HTTPBasic(auto_error=False)

    def check(
        request: Request, credentials: Annotated[HTTPBasicCredentials | None, Depends(basic)]
    ) -> None:
        host = request.headers.get("host", "").rsplit(":", 1)[0]
        if not is_loopback(request) or host not in LOCAL:
            raise ApiError(403, "forbidden", "the admin page is for this machine only")
        asked = (credentials.username, credentials.password) if credentials else ("", "")
        known = [
            hmac.compare_digest(found.encode(), expected.encode())
            for found, expected in zip(asked, (OWNER, password), strict=True)
        ]
        if not all(known):
            raise HTTPException(401, "user or password are wrong", {"www-authenticate": "Basic"})

    return check


def is_loopback(request: Request) -> bool:
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except (AttributeError, ValueError):
        return False
