"""The chat page in front of a real server: streams, stops, starts anew, shows its figures.

Needs playwright and a Chromium, one of the system or playwright's own; run by ``make test-browser``.
``CONMOE_CHROMIUM`` names another one, and ``CONMOE_SCREENSHOTS`` a folder for pictures of the page. What the demo model
never says stands in ``test_page_answers.py`` and the files beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import KEY, NAME, Running
from tests.serve.page_window import SIZES, Window, settles

pytestmark = pytest.mark.browser

QUESTION = "Tell me a short story about a lighthouse."


@pytest.fixture
def opened(browser: Any, server: Running) -> Iterator[Window]:
    server.idle()
    window = Window(browser, server.url, SIZES["desktop"])
    window.ready()
    yield window
    assert window.problems == []
    window.close()


def copied(opened: Window) -> str:
    """The last answer, to the letter."""
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.page.locator("li.answer").last.locator("[data-action=copy]").click()
    return opened.page.evaluate("navigator.clipboard.readText()")


def greedy(server: Running, messages: list[dict[str, str]], tokens: int) -> str:
    reply = server.client().chat.completions.create(
        model=NAME, messages=messages, temperature=0, max_tokens=tokens
    )
    return reply.choices[0].message.content or ""


def test_it_streams_the_servers_answer(opened: Window, server: Running) -> None:
    assert opened.page.inner_text("#model") == NAME
    opened.setting("temperature", "0")
    opened.setting("max-tokens", "40")
    text = opened.page.locator("li.answer .text").first
    with server.held(after=2) as let_pass:
        opened.ask(QUESTION)
        opened.page.wait_for_selector("li.answer.busy")
        length = 0
        for _ in range(4):  # it grows while it is made
            settles(text, f".{{{length + 1}}}")
            length = len(text.inner_text())
            let_pass(2)
    opened.answered()
    first = [{"role": "user", "content": QUESTION}]
    expected = greedy(server, first, 40)
    assert [copied(opened)] == [expected]
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
    assert copied(opened) == greedy(server, turns, 40), "the answer went back as it came"


def test_it_stops_and_starts_anew(opened: Window, server: Running) -> None:
    opened.setting("max-tokens", "1500")
    opened.setting("temperature", "0")  # the answer is known to be longer than a few rounds
    for stop in (lambda: opened.page.click("#stop"), lambda: opened.page.press("body", "Escape")):
        with server.held(after=6):
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


def test_it_shows_memory_and_the_cache_at_work(opened: Window, server: Running) -> None:
    opened.setting("max-tokens", "60")
    opened.ask(QUESTION)
    opened.page.wait_for_selector("li.answer.busy")
    while opened.page.locator("li.answer.busy").count():
        assert opened.page.inner_text("#speed").strip("0.") != "", "a speed of nothing"
        opened.page.wait_for_timeout(50)
    settles(opened.page.locator("#hits"), "%$")
    settles(opened.page.locator("#speed"), "[1-9]")
    opened.answered()
    opened.page.wait_for_timeout(1500)
    stats = server.get("/stats").json()
    memory, cache = stats["memory"], stats["cache"]
    limit = f"{round(memory['budget'] / 2**20)} MiB"
    assert opened.page.inner_text("#memory-of") == f"of {limit}"
    assert abs(int(opened.page.inner_text("#memory").split()[0]) - memory["used"] / 2**20) < 8
    assert opened.page.locator("#cells .here").count() == cache["resident"]
    assert opened.page.locator("#cells rect").count() == cache["prototypes"]


def test_what_is_asked_is_never_markup(opened: Window) -> None:
    opened.setting("max-tokens", "2")
    opened.ask('<img src=x onerror="document.title=1"> **b** <b>x</b>')
    opened.page.wait_for_selector("li.answer .under")
    assert opened.page.locator("li img, li b, li.mine strong").count() == 0
    assert opened.page.inner_text("li.mine .text").endswith("**b** <b>x</b>")


def test_a_message_that_is_too_long_says_so_where_it_stands(opened: Window) -> None:
    opened.ask("word " * 3000)
    opened.page.wait_for_selector("li.answer [role=alert]")
    assert "longer than the model can hold" in opened.page.inner_text("li.answer .problem")
    assert opened.page.inner_text("li.mine .text").startswith("word word"), "nothing typed is lost"
    assert opened.page.is_visible("li.mine [data-action=edit]")
    opened.problems.clear()  # the browser notes the 400 itself


def test_nothing_is_loaded_from_elsewhere(opened: Window, server: Running) -> None:
    opened.setting("max-tokens", "2")
    opened.ask(QUESTION)
    opened.page.wait_for_selector("li.answer .under")
    assert opened.addresses
    assert all(address.startswith(server.url) for address in opened.addresses)


def test_it_asks_for_the_key(browser: Any, strict: Running) -> None:
    strict.idle()
    window = Window(browser, strict.url, SIZES["desktop"])
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
    window.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_its_window(browser: Any, server: Running, size: str, scheme: str) -> None:
    server.idle()
    window = Window(browser, server.url, SIZES[size], scheme)
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
    window.close()
