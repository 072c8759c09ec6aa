"""Pages in headless Chromium, as a reader sees them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
def opened(file: Path) -> Iterator[Page]:
    """The page in a window; errors and warnings of the console fail the test."""
    messages = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox"] if os.name == "posix" else []
        )
        page = browser.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url))
        page.goto(file.as_uri())
        yield page
        browser.close()
    assert [m for m in messages if m != file.as_uri() and not m.startswith("data:")] == []


def problems_of(file: Path) -> list[str]:
    """What axe-core finds wrong with a page (contrast, labels, headings), and whether it is wider
    than the window; in light and dark colours, at three widths."""
    found = []
    with opened(file) as page:
        for colours in ("light", "dark"):
            for width in WIDTHS:
                page.emulate_media(color_scheme=colours)
                page.set_viewport_size({"width": width, "height": 900})
                where = f"{colours}, {width} px"
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    found.append(f"wider than the window: {where}")
                for problem in Axe().run(page).response["violations"]:
                    nodes = [node["html"][:120] for node in problem["nodes"][:3]]
                    found.append(f"{problem['id']}: {where}: {nodes}")
    return found
