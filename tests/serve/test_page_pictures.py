"""The page at a phone's width and at a desk's, light and dark: nothing runs over, all can be read and reached.

``CONMOE_SCREENSHOTS=DIR`` keeps a picture of each state.
"""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.offload.generation.answer_parts import Called, Said, Thought
from conmoe_edge.serve.http_errors import ApiError
from tests.patience import PATIENCE
from tests.serve.page_window import SIZES, Window
from tests.serve.scripted_server import MIB, Script, Scripted

pytestmark = pytest.mark.browser

ANSWER = """The Rhine is **1,233 km** long. Three rivers of the Alps:

| River | Length | Sea |
|:--|--:|:--|
| Rhine | 1,233 km | North Sea |
| Rhône | 812 km | Mediterranean |
| Danube | 2,850 km | Black Sea |

To add their lengths in Python:

```python
def total(lengths: dict[str, float]) -> float:
    \"\"\"The sum of all lengths, in kilometres.\"\"\"
    return sum(length for river, length in lengths.items() if river.startswith(("R", "D")))
```

1. Call `total({"Rhine": 1233, "Rhône": 812})`
2. See [the Rhine](https://example.org/rhine)
   - it rises in Switzerland
   - it ends in the Netherlands

> All rivers run into the sea.
"""
THOUGHTS = [Thought("The user asks for lengths.\n\nI should look them up first.")]

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => {
    const part = (v) => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
    return .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
  };
  const over = (top, low) => top.slice(0, 3).map((v, i) => v * top[3] + low[i] * (1 - top[3]));
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest('.off-screen, noscript, option, :disabled')) continue;
    const grounds = []; let faint = 1;
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      grounds.unshift(rgba(style.backgroundColor)); faint *= Number(style.opacity);
    }
    const ground = grounds.reduce((low, top) => over(top, low), [255, 255, 255]);
    const style = getComputedStyle(element), ink = rgba(style.color);
    const ratio = ([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const seen = ratio([light(over([...ink.slice(0, 3), ink[3] * faint], ground)), light(ground)]);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (seen < (large ? 3 : 4.5)) found.push(`${seen.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return found;
}"""
UNNAMED = """() => Array.from(document.querySelectorAll('button, input, textarea, select, summary, [role=img]'))
  .filter((e) => e.checkVisibility() && !(e.textContent.trim() && e.matches('button, summary'))
    && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby') && !e.labels?.length)
  .map((e) => e.outerHTML)"""


class Look:
    """One window, and what has to hold whatever it shows."""

    def __init__(self, window: Window, size: str, scheme: str) -> None:
        self.window, self.size, self.scheme = window, size, scheme

    def at(self, name: str) -> None:
        page = self.window.page
        page.wait_for_timeout(500)  # a bar moves into its place
        self.window.picture(f"{name}-{SIZES[self.size][0]}-{self.scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[self.size][0]
        for panel in ("#chat", "#figures", "#list"):
            over = page.locator(panel).evaluate("e => e.scrollWidth - e.clientWidth")
            assert over <= 0, f"{panel} runs over in {name}"
        assert page.evaluate(CONTRAST) == [], name
        assert page.evaluate(UNNAMED) == [], name

    def drawer(self, toggle: str) -> None:
        if self.window.page.is_visible(toggle):
            self.window.page.click(toggle)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_state_can_be_read(browser: Any, scripted: Scripted, size: str, scheme: str) -> None:
    window = Window(browser, scripted.url, SIZES[size], scheme)
    page, look = window.page, Look(window, size, scheme)
    window.ready()
    look.at("empty")
    scripted.says("How long are the rivers of the Alps?", Script([Said(ANSWER)], tokens=212))
    window.answer("How long are the rivers of the Alps?")
    page.locator("#chat").evaluate("e => { e.scrollTop = 0; }")
    look.at("answer")
    page.locator("#chat").evaluate("e => { e.scrollTop = e.scrollHeight; }")
    look.at("answer-end")

    arguments = '{"river": "Rhine", "unit": "km"}'
    parts = [*THOUGHTS, Said("I look it up."), Called("river_length", arguments)]
    scripted.says("Look it up.", Script(parts))
    page.click("#new")
    item = window.answer("Look it up.")
    look.at("folded")
    item.locator("details.reasoning summary").click()
    item.locator("details.call summary").click()
    look.at("unfolded")

    page.click("#new")
    scripted.says("Tell me of the sea.", Script([Said("The sea is")], breaks=True))
    window.answer("Tell me of the sea.")
    full = ApiError(400, "The conversation needs 2391 tokens, and the memory was planned for 2048.")
    full.code = "context_length_exceeded"
    window.setting("on-full", "stop")
    scripted.says("And of the lakes?", Script(refused=full))
    window.answer("And of the lakes?")
    look.at("error")
    wait = ApiError(429, "Too many requests are waiting.", headers={"Retry-After": "30"})
    scripted.says("And of the ponds?", Script(refused=wait))
    window.ask("And of the ponds?")
    page.wait_for_selector(".waiting")
    look.at("waiting")
    assert page.locator("[data-action=try-now]").evaluate(
        "e => e.getBoundingClientRect().bottom <= document.querySelector('footer').offsetTop"
    )
    page.keyboard.press("Escape")
    window.answered()

    look.drawer("#list-toggle")
    page.locator("#conversations .menu summary").nth(1).click()
    look.at("list")
    page.locator("#conversations [data-action=rename]").nth(1).click()
    look.at("rename")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")

    scripted.stats["cache"] = {**scripted.stats["cache"], "hits": 9400, "misses": 420}
    scripted.stats["running"], scripted.stats["tokens_per_second"] = 1, 11.7
    look.drawer("#figures-toggle")
    for step in range(4):
        scripted.stats["cache"]["hits"] += 300 + 40 * step
        scripted.stats["cache"]["misses"] += 30 - 7 * step
        with page.expect_response("**/stats", timeout=1000 * PATIENCE):
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_timeout(150)
    assert page.inner_text("#speed") == "11.7"
    look.at("tiers")
    scripted.stats["memory"]["device"] = "cuda:0"
    scripted.stats["cache"] = {
        **scripted.stats["cache"],
        "prototypes": 6144,
        "resident": 1500,
        "host_bytes": 900 * MIB,
    }
    with page.expect_response("**/stats"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    look.at("tiers-gpu")
    page.click("#settings > summary")
    look.at("settings")
    window.close()


def test_it_is_used_by_the_keyboard_alone(window: Window, scripted: Scripted) -> None:
    page = window.page
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("li.answer .under")
    window.answered()
    assert scripted.asked[-1]["messages"][0]["content"] == "One\ntwo"
    assert page.evaluate("document.activeElement.id") == "question"
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        ring = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.dataset.action || e.id || e.localName, e === document.body || e.id === 'chat'"
            " || (s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2)]; }"
        )
        assert ring[1], f"{ring[0]} shows no focus"
        if ring[0] == "edit":
            break
    assert ring[0] == "edit"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('form').className") == "edit"


def test_what_moves_stands_still_for_those_who_ask(browser: Any, scripted: Scripted) -> None:
    window = Window(browser, scripted.url, SIZES["desktop"])
    scripted.says("Slow?", Script([Said("word ")] * 40, pace=0.05))
    window.ready()
    look = "getComputedStyle(document.querySelector('.busy .text > p'), '::after').animationName"
    window.ask("Slow?")
    window.page.wait_for_selector(".busy .text > p")
    assert window.page.evaluate(look) == "blink"
    window.page.emulate_media(reduced_motion="reduce")
    assert window.page.evaluate(look) == "none"
    window.close()
