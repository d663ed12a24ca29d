"""The chat page in a window of Chromium, as the tests of the page use it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE

SIZES = {"desktop": (1280, 800), "phone": (360, 740)}
_MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def system_chromium() -> str | None:
    """A Chromium or Chrome of this system; ``None`` for playwright's own. ``CONMOE_CHROMIUM`` names another one."""
    named = os.environ.get("CONMOE_CHROMIUM")
    if named:
        return named
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None and sys.platform == "darwin" and Path(_MACOS).exists():
        return _MACOS
    return found


def settles(locator: Any, pattern: str) -> None:
    """Wait until the text matches; without evaluating strings, which the page's own policy forbids."""
    sync_api = pytest.importorskip("playwright.sync_api")
    expected = re.compile(pattern, re.DOTALL)
    sync_api.expect(locator).to_have_text(expected, timeout=1000 * PATIENCE)


class Window:
    """The page in a browser profile of its own; whatever it complains of is kept."""

    def __init__(
        self, browser: Any, url: str, size: tuple[int, int], scheme: str = "light"
    ) -> None:
        width, height = size
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            locale="en-US",
            accept_downloads=True,
        )
        self.url = url
        self.problems: list[str] = []
        self.addresses: set[str] = set()
        self.page = self.tab()

    def tab(self) -> Any:
        """One more tab of the same profile."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        page.on("request", lambda request: self.addresses.add(request.url))
        page.goto(f"{self.url}/")
        return page

    def close(self) -> None:
        self.context.close()

    def ready(self) -> None:
        self.page.wait_for_selector("#state[data-state=ready]")

    def ask(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def answered(self) -> None:
        self.page.wait_for_selector("#send:not([hidden])", timeout=1000 * PATIENCE)

    def answer(self, question: str) -> Any:
        """Ask, wait, and find the answer's item."""
        self.ask(question)
        self.answered()
        items = self.page.locator("li.answer")
        return items.nth(items.count() - 1)

    def answers(self) -> list[str]:
        return self.page.locator("li.answer .text").all_inner_texts()

    def setting(self, name: str, value: str) -> None:
        self.page.evaluate(
            "([id, value]) => { const e = document.getElementById(id); e.value = value;"
            " e.dispatchEvent(new Event('input')); }",
            [name, value],
        )

    def picture(self, name: str) -> None:
        folder = os.environ.get("CONMOE_SCREENSHOTS")
        if folder:
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))
