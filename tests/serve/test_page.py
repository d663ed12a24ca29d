"""The chat page in Chromium: streams, stops, starts anew, shows its figures.

Needs playwright and a Chromium; run by ``make test-browser``. ``CONMOE_CHROMIUM`` names another one, and
``CONMOE_SCREENSHOTS`` a folder for pictures of the page.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import KEY, NAME, Running

pytestmark = pytest.mark.browser

QUESTION = "Tell me a short story about a lighthouse."
SIZES = {"desktop": (1180, 760), "phone": (390, 800)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CONMOE_CHROMIUM") or shutil.which("chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def settles(locator: Any, pattern: str) -> None:
    """Wait until the text matches; without evaluating strings, which the page's own policy forbids."""
    sync_api = pytest.importorskip("playwright.sync_api")
    expected = re.compile(pattern, re.DOTALL)
    sync_api.expect(locator).to_have_text(expected, timeout=30_000)


class Opened:
    """The page in a window of its own; whatever it complains of is kept."""

    def __init__(
        self, browser: Any, url: str, size: tuple[int, int], scheme: str = "light"
    ) -> None:
        width, height = size
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, locale="en-US"
        )
        self.page = context.new_page()
        self.problems: list[str] = []
        self.addresses: set[str] = set()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console", lambda m: self.problems.append(m.text) if m.type == "error" else None
        )
        self.page.on("request", lambda request: self.addresses.add(request.url))
        self.page.goto(f"{url}/")

    def ready(self) -> None:
        self.page.wait_for_selector("#state[data-state=ready]")

    def ask(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def answered(self) -> None:
        self.page.wait_for_selector("#send:not([hidden])", timeout=90_000)

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


@pytest.fixture
def opened(browser: Any, server: Running) -> Iterator[Opened]:
    server.idle()
    window = Opened(browser, server.url, SIZES["desktop"])
    window.ready()
    yield window
    assert window.problems == []
    window.page.context.close()


def greedy(server: Running, messages: list[dict[str, str]], tokens: int) -> str:
    reply = server.client().chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=tokens
    )
    return reply.choices[0].message.content or ""


def test_it_streams_the_servers_answer(opened: Opened, server: Running) -> None:
    assert opened.page.inner_text("#model") == NAME
    opened.setting("temperature", "0")
    opened.setting("max-tokens", "40")
    opened.ask(QUESTION)
    opened.page.wait_for_selector("li.answer.busy")
    lengths = set()
    while opened.page.locator("li.answer.busy").count():
        lengths.add(len(opened.page.locator("li.answer .text").first.inner_text()))
        opened.page.wait_for_timeout(50)
    assert len(lengths) > 3, "the text grew"
    opened.answered()
    first = [{"role": "user", "content": QUESTION}]
    expected = greedy(server, first, 40)
    assert opened.answers() == [expected]
    under = opened.page.inner_text("li.answer .under")
    assert "40 tokens" in under and "tokens/s" in under and "first token" in under
    opened.ask("And then?")
    opened.page.wait_for_selector("li.answer.busy")
    opened.answered()
    turns = [
        *first,
        {"role": "assistant", "content": expected},
        {"role": "user", "content": "And then?"},
    ]
    assert opened.answers() == [expected, greedy(server, turns, 40)]


def test_it_stops_and_starts_anew(opened: Opened, server: Running) -> None:
    opened.setting("max-tokens", "1500")
    opened.setting("temperature", "1")
    for stop in (lambda: opened.page.click("#stop"), lambda: opened.page.press("body", "Escape")):
        opened.ask(QUESTION)
        settles(opened.page.locator("li.answer .text").last, ".{6}")
        server.wait_until({"conmoe_running": 1})
        stop()
        opened.answered()
        server.idle()
        assert "stopped" in opened.page.locator("li.answer .under").last.inner_text()
    opened.page.click("#new")
    assert opened.answers() == []
    assert opened.page.is_visible("#welcome")
    opened.setting("max-tokens", "3")
    opened.page.click("#ideas button >> nth=1")
    opened.page.wait_for_selector("li.answer .under")
    assert len(opened.answers()) == 1


def test_it_shows_memory_and_the_cache_at_work(opened: Opened, server: Running) -> None:
    opened.setting("max-tokens", "60")
    opened.ask(QUESTION)
    settles(opened.page.locator("#hits"), "%$")
    settles(opened.page.locator("#speed"), "[1-9]")
    opened.answered()
    opened.page.wait_for_timeout(1500)
    memory = server.get("/stats").json()["memory"]
    limit = f"{round(memory['budget'] / 2**20)} MiB"
    assert opened.page.inner_text("#memory-of") == f"of {limit}"
    assert abs(int(opened.page.inner_text("#memory")) - memory["used"] / 2**20) < 8
    assert opened.page.get_attribute("#spark polyline", "points")


def test_text_is_never_markup(opened: Opened) -> None:
    opened.setting("max-tokens", "2")
    opened.ask('<img src=x onerror="document.title=1"> ```py\n<b>x</b>\n```')
    opened.page.wait_for_selector("li.answer .under")
    assert opened.page.locator("li img, li b").count() == 0
    assert opened.page.inner_text("li.mine pre") == "<b>x</b>"


def test_a_conversation_that_is_too_long_says_so(opened: Opened) -> None:
    opened.ask("word " * 3000)
    alert = opened.page.wait_for_selector("[role=alert]")
    assert alert is not None and "as long as the model can hold" in alert.inner_text()
    assert opened.page.input_value("#question").startswith("word word"), "nothing typed is lost"
    opened.problems.clear()  # the browser notes the 400 itself


def test_nothing_is_loaded_from_elsewhere(opened: Opened, server: Running) -> None:
    opened.setting("max-tokens", "2")
    opened.ask(QUESTION)
    opened.page.wait_for_selector("li.answer .under")
    assert opened.addresses
    assert all(address.startswith(server.url) for address in opened.addresses)


def test_it_asks_for_the_key(browser: Any, strict: Running) -> None:
    strict.idle()
    window = Opened(browser, strict.url, SIZES["desktop"])
    page = window.page
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-wrong:not([hidden])")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    window.ready()
    window.setting("max-tokens", "3")
    window.ask(QUESTION)
    page.wait_for_selector("li.answer .under")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_its_window(browser: Any, server: Running, size: str, scheme: str) -> None:
    server.idle()
    window = Opened(browser, server.url, SIZES[size], scheme)
    window.ready()
    window.picture(f"{size}-{scheme}-empty")
    window.setting("max-tokens", "90")
    window.ask(QUESTION)
    window.page.wait_for_selector("li.answer.busy")
    window.page.wait_for_timeout(2500)
    window.picture(f"{size}-{scheme}-busy")
    window.answered()
    window.picture(f"{size}-{scheme}")
    page = window.page
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    for name in ("#question", "#send", "#new"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size][0]
        assert box["y"] >= 0 and box["y"] + box["height"] <= SIZES[size][1]
    if size == "phone":
        assert not page.is_visible("#figures")
        page.click("#figures-toggle")
        window.picture(f"{size}-{scheme}-figures")
    assert page.is_visible("#memory")
    assert window.problems == []
    page.context.close()


def _stream(pieces: list[str], ends: str = "stop") -> str:
    """An answer as the server streams it; ``pieces`` stand in JSON as they are."""
    chunks = [
        {"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    chunks.append({"choices": [{"delta": {}, "finish_reason": ends}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


HOSTILE = {
    "markup": [
        "<img src=x onerror=document.title='taken'>",
        "<script>document.title='taken'</",
        "script>",
    ],
    "links": [
        "[a](javascript:document.title='taken') <a href='javascript:x'>b</a> http://other.invalid/"
    ],
    "markup in a fence": [
        "```html\n<b>x</b><iframe src=//other.invalid></iframe>\n",
        "```",
        "<style>*{display:none}</style>",
    ],
    "no line breaks": ["x" * 300_000],
    "a long line in a fence": ["```\n" + "y" * 300_000 + "\n```"],
    "a million characters": ["word " * 10_000] * 20,
    "many fences": ["```" * 50_000],
    "right to left": ["\u202eevil \u2066\u202d \u05e9\u05dc\u05d5\u05dd \u202e" * 50],
    "control characters": [
        "".join(map(chr, range(32))) + "\x7f\x9b\u2028\u2029\ufeff\ufffe\U000f0000"
    ],
    "halves of characters": ["a \ud83d b", "\ude00 c \udfff"],
    "marks on marks": ["Z" + "\u0301" * 5000],
    "names of the page": ["__proto__ constructor ${document.title} {{x}} %s \\u003cb\\u003e"],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_answer_is_never_more_than_text(opened: Opened, name: str) -> None:
    page, pieces = opened.page, HOSTILE[name]
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=_stream(pieces)),
    )
    elements = page.evaluate("document.querySelectorAll('*').length")
    title, width = page.title(), page.evaluate("document.documentElement.scrollWidth")
    opened.ask("Say it.")
    page.wait_for_selector("li.answer:not(.busy)", timeout=60_000)
    whole = page.evaluate("document.querySelector('li.answer .text').textContent.isWellFormed()")
    shown = page.locator("li.answer .text").first.evaluate("e => e.textContent.length")
    fences = "".join(pieces).count("```")
    lost = 16 * fences if fences < 1000 else 0  # fences and the name of a language
    said = "".join(pieces).encode("utf-16-le", "surrogatepass")
    assert len(said) // 2 - lost <= shown <= len(said) // 2
    assert whole == (name != "halves of characters")
    allowed = "li, ol, div, span, pre"
    assert page.evaluate(f"document.querySelectorAll('#messages *:not({allowed})').length") == 0
    assert page.evaluate("document.querySelectorAll('*').length") < elements + 20
    assert page.title() == title and "taken" not in title
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert all(address.startswith(page.url) for address in opened.addresses)
    # The page goes on: the next question is asked, and the hostile answer travels with it as text.
    page.unroute("**/v1/chat/completions")
    if shown > 500:  # more than the model can hold
        page.click("#new")
    opened.setting("max-tokens", "2")
    opened.ask("Hello")
    page.wait_for_selector("li.answer:last-child .under")
    opened.answered()
    assert page.locator("[role=alert]").count() == 0
