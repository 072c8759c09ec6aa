"""Pages in headless Chromium, as a reader sees them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (400, 820, 1400)  # a telephone, a tablet, a laptop


def chromium() -> str:
    """The installed browser. Without one, the tests that need it are skipped, but not in CI."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found and not os.environ.get("CI"):
        pytest.skip("needs Chromium or Chrome, which is not installed")
    assert found, "CI tests the pages: install chromium"
    return found


@contextmanager
def opened(
    where: Path | str, password: tuple[str, str] | None = None, expected: str | None = None
) -> Iterator[Page]:
    """A file or an address in a window; errors and warnings of the console, and requests to
    elsewhere, fail the test. password: (user, password) of the page. expected: a part of messages
    that do not."""
    address = where if isinstance(where, str) else where.as_uri()
    parts = urlsplit(address)
    origin = f"{parts.scheme}://{parts.netloc}/" if parts.netloc else address
    messages = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"] if os.name == "posix" else []
        )
        user, word = password or (None, None)
        page = browser.new_page(
            http_credentials={"username": user, "password": word} if user else None
        )
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url))
        page.goto(address)
        yield page
        browser.close()
    others = [m for m in messages if not m.startswith((origin, "data:"))]
    assert [m for m in others if not (expected and expected in m)] == []


def problems_of(where: Path | str, password: tuple[str, str] | None = None) -> list[str]:
    """What axe-core finds wrong with a page (contrast, labels, headings), and whether it is wider
    than the window; in light and dark colours, at three widths."""
    found = []
    with opened(where, password) as page:
        for colours in ("light", "dark"):
            for width in WIDTHS:
                page.emulate_media(color_scheme=colours)
                page.set_viewport_size({"width": width, "height": 900})
                seen = f"{colours}, {width} px"
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    found.append(f"wider than the window: {seen}")
                for problem in Axe().run(page).response["violations"]:
                    nodes = [node["html"][:120] for node in problem["nodes"][:3]]
                    found.append(f"{problem['id']}: {seen}: {nodes}")
    return found
