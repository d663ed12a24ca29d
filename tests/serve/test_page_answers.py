"""What an answer becomes on the page: markdown that grows, folded reasoning and calls, and nothing that runs."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from conmoe_edge.offload.generation.answer_parts import Called, Said, Thought
from tests.serve.page_window import Window, settles
from tests.serve.scripted_server import Script, Scripted, words

pytestmark = pytest.mark.browser

MARKDOWN = """Here is a **short** answer with `code`, a [link](https://example.org/a?b=c&d) and *emphasis*.

## Rivers

1. The Rhine
2. The Aare
   - joins the Rhine
   - is *clear*

| River | Length | Sea |
|:--|--:|:-:|
| Rhine | 1,233 km | North Sea |
| Danube | 2,850 km | Black Sea |

```python
def add(a: int, b: int) -> int:
    return a + b if a < b else "<b>"
```

> Rivers never go back.

~~~
``` in another fence
~~~

A line
and the next one.
"""
ALLOWED = {
    *("p", "br", "hr", "h3", "h4", "h5", "h6", "strong", "em", "s", "blockquote", "ul", "ol", "li"),
    *("table", "thead", "tbody", "tr", "th", "td", "pre", "code", "a", "div", "span", "button"),
}


def html(window: Window, number: int = -1) -> str:
    return window.page.locator("li.answer .text").nth(number).inner_html()


def test_markdown(window: Window, scripted: Scripted) -> None:
    scripted.says("Show me.", MARKDOWN)
    item = window.answer("Show me.")
    body = item.locator(".text")
    assert body.locator("strong").inner_text() == "short"
    assert body.locator("ol > li").count() == 2 and body.locator("ol ul > li").count() == 2
    assert body.locator("th").all_inner_texts() == ["River", "Length", "Sea"]
    assert body.locator("tbody td").nth(1).evaluate("e => getComputedStyle(e).textAlign") == "right"
    code = body.locator(".code").first
    assert code.locator("code").inner_text() == (
        'def add(a: int, b: int) -> int:\n    return a + b if a < b else "<b>"'
    )
    assert code.locator(".code-head span").inner_text() == "python"
    assert body.locator("h4").inner_text() == "Rivers"
    link = body.locator("a")
    assert link.get_attribute("href") == "https://example.org/a?b=c&d"
    assert set(str(link.get_attribute("rel")).split()) >= {"noopener", "noreferrer"}
    assert link.get_attribute("target") == "_blank"
    assert body.locator("p").last.locator("br").count() == 1


def test_what_is_copied_is_what_was_said(window: Window, scripted: Scripted) -> None:
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    scripted.says("Show me.", MARKDOWN)
    item = window.answer("Show me.")
    item.locator("[data-action=copy]").click()
    assert window.page.evaluate("navigator.clipboard.readText()") == MARKDOWN
    settles(item.locator("[data-action=copy]"), "Copied")
    item.locator(".copy-code").first.click()
    copied = window.page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("def add(") and copied.endswith('"<b>"')


PIECES = {
    "by words": lambda: words(MARKDOWN),
    "by letters": lambda: [Said(letter) for letter in MARKDOWN],
    "a list that goes on": lambda: words(
        "1. a\n\n2. b\n\n3. c\n\nend\n\n- x\n\n- y\n\n  z\n\n- w\n"
    ),
    "a heading from below": lambda: [Said(c) for c in "one\n\ntwo\n===\n\nthree\n---\n\nfour"],
    "a table late": lambda: [Said(c) for c in "a\n\n|a|b|\n|-|-|\n|1|2|\n\nb\n\n|c|\n|-|\n|3|\n"],
    "other line breaks": lambda: [Said(c) for c in "a\r\n\r\n- b\r\n- c\r\r\n\nd\r\ne"],
    "a fence that does not end": lambda: words("a\n\nb\n\nc\n\n```py\n# d\n\ne\n\n- f\n"),
    "an address from below": lambda: words("[a]\n\nb\n\nc\n\n[a]: https://example.org/\n"),
}


@pytest.mark.parametrize("name", PIECES)
def test_what_has_grown_is_what_the_whole_is(window: Window, scripted: Scripted, name: str) -> None:
    parts = PIECES[name]()
    whole = "".join(part.text for part in parts)
    scripted.says("Grow.", Script(parts, pace=0.002))
    scripted.says("Whole.", whole)
    window.answer("Grow.")
    window.answer("Whole.")
    assert html(window, 0) == html(window, 1) != ""


def test_blocks_that_are_over_stay_while_it_grows(window: Window, scripted: Scripted) -> None:
    scripted.says("Grow.", Script(words(MARKDOWN), pace=0.02))
    window.ask("Grow.")
    window.page.wait_for_selector("li.answer ol")
    marked = window.page.evaluate(
        "() => { const e = document.querySelector('li.answer strong'); e.marked = true;"
        " getSelection().selectAllChildren(e); return e.textContent; }"
    )
    window.answered()
    assert window.page.evaluate("document.querySelector('li.answer strong').marked") is True
    assert window.page.evaluate("getSelection().toString()") == marked


def test_reasoning_is_folded_and_not_sent_back(window: Window, scripted: Scripted) -> None:
    thought = "The user wants\n\n<b>rivers</b>."
    scripted.says(
        "Think.", Script([Thought("The user wants\n\n"), Thought("<b>rivers</b>."), Said("Rhine.")])
    )
    item = window.answer("Think.")
    fold = item.locator("details.reasoning")
    assert fold.get_attribute("open") is None and not fold.locator(".thoughts").is_visible()
    summary = fold.locator("summary").inner_text()
    assert re.fullmatch(r"Reasoning|Reasoned for \d+\.\d s", summary)
    fold.locator("summary").press("Enter")
    assert fold.locator(".thoughts").inner_text() == thought
    assert item.locator(".text").inner_text() == "Rhine."
    window.answer("And?")
    assert fold.get_attribute("open") is not None, "what was unfolded stays so"
    assert scripted.asked[-1]["messages"] == [
        {"role": "user", "content": "Think."},
        {"role": "assistant", "content": "Rhine."},
        {"role": "user", "content": "And?"},
    ]


TOOL = {"name": "river_length", "parameters": {"type": "object", "properties": {}}}


def test_calls_are_folded_and_results_go_back(window: Window, scripted: Scripted) -> None:
    window.page.click("#settings > summary")
    window.page.fill("#tools", json.dumps([TOOL]))
    arguments = '{"river": "Rhine", "exact": 12345678901234567890}'
    scripted.says("How long?", Script([Said("One moment."), Called("river_length", arguments)]))
    item = window.answer("How long?")
    assert scripted.asked[-1]["tools"] == [{"type": "function", "function": TOOL}]
    fold = item.locator("details.call")
    assert fold.get_attribute("open") is None
    assert "river_length" in fold.locator("summary").inner_text()
    fold.locator("summary").click()
    assert fold.locator("pre").inner_text() == arguments, "no digit is rounded"
    scripted.says("1,233 km", "It is 1,233 km long.")
    item.locator("form.results textarea").fill("1,233 km")
    item.locator("form.results button").click()
    window.page.wait_for_selector("li.result")
    window.answered()
    call, result = scripted.asked[-1]["messages"][1:]
    assert call["content"] == "One moment." and len(call["tool_calls"]) == 1
    assert call["tool_calls"][0]["function"] == {"name": "river_length", "arguments": arguments}
    assert result == {
        "role": "tool",
        "tool_call_id": call["tool_calls"][0]["id"],
        "content": "1,233 km",
    }
    assert window.answers()[-1] == "It is 1,233 km long."
    assert window.page.inner_text("li.result summary") == "Result of river_length"


def test_tools_that_are_no_json_are_said_before_they_are_sent(
    window: Window, scripted: Scripted
) -> None:
    window.page.click("#settings > summary")
    window.page.fill("#tools", "[{]")
    assert "no JSON" in window.page.inner_text("#tools-wrong")
    item = window.answer("Hello")
    assert "no JSON" in item.locator(".problem").inner_text() and scripted.asked == []


HOSTILE: dict[str, list[str]] = {
    "markup": [
        "<img src=x onerror=document.title='taken'>",
        "<script>document.title='taken'</",
        "script>\n\n<svg onload=document.title='taken'>\n\n<iframe srcdoc=x>\n\n<style>*{display:none}</style>",
    ],
    "links": [
        "[a](javascript:document.title='taken') [b](JaVaScRiPt:x) [c](&#106;avascript:x) [d](data:text/html,x)\n"
        "[e](vbscript:x) [f](/metrics) [g](//other.invalid) [h](java\tscript:x) <javascript:x> [i](file:///etc/passwd)"
    ],
    "pictures": [
        "![a](http://other.invalid/a.png) ![b](/v1/models) ![c](data:image/svg+xml;base64,PHN2Zz4=)\n\n"
        "[![d](http://other.invalid/d.png)](http://other.invalid/e)\n\n![r]\n\n[r]: http://other.invalid/f.png"
    ],
    "titles and names": [
        '[a](https://example.org "\\" onmouseover=document.title=1 x=\\"")\n\n# a {#taken .taken onclick=x}'
    ],
    "fences": [
        "```html\n<b>x</b><iframe src=//other.invalid></iframe>\n",
        "```",
        '\n```"><img/src=x/onerror=document.title=1>\nx\n```\n~~~<script>\ny',
    ],
    "tables": ["|<script>|" * 50 + "\n" + "|-|" * 50 + "\n" + "|<img src=x onerror=x>|" * 50],
    "mutations": [
        "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=x&gt;'>\n\n"
        "<noscript><p title='</noscript><img src=x onerror=x>'>\n\n<form><input name=attributes><svg></p>"
        "<style><a id='</style>"
    ],
    "names of the page": [
        "__proto__ constructor ${document.title} {{x}} %s \\u003cb\\u003e &lt;b&gt;"
    ],
    "a long word": ["x" * 300_000],
    "a long line in a fence": ["```\n" + "y" * 90_000 + "\n```"],
    "a million characters": ["word " * 10_000] * 20,
    "many fences": ["```\n" * 24_000],
    "deep quotes": [">" * 50_000 + " x"],
    "deep lists": ["- " * 40_000 + "x"],
    "brackets": ["[" * 90_000],
    "stars": ["*a " * 30_000],
    "a wide table": ["|a" * 300 + "\n" + "|-" * 300 + "\n" + ("|a" * 300 + "\n") * 200],
    "right to left": ["\u202eevil \u2066\u202d \u05e9\u05dc\u05d5\u05dd \u202e" * 50],
    "control characters": [
        "".join(map(chr, range(32))) + "\x7f\x9b\u2028\u2029\ufeff\ufffe\U000f0000"
    ],
    "halves of characters": ["a \ud83d b", "\ude00 c \udfff"],
    "marks on marks": ["Z" + "\u0301" * 5000],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_an_answer_runs_or_is_loaded(
    window: Window, scripted: Scripted, name: str
) -> None:
    page, pieces = window.page, HOSTILE[name]
    whole = "".join(pieces)
    scripted.says("Say it.", Script([Said(piece) for piece in pieces]))
    if any("\ud800" <= letter <= "\udfff" for letter in whole):
        page.route(  # the server's own events are UTF-8 and have no such halves; a proxy's may
            "**/v1/chat/completions",
            lambda route: route.fulfill(content_type="text/event-stream", body=_escaped(pieces)),
        )
    title, width = page.title(), page.evaluate("document.documentElement.scrollWidth")
    window.answer("Say it.")
    assert page.locator("li.answer .problem").count() == 0
    seen = page.evaluate(
        "() => Array.from(document.querySelectorAll('li.answer .text *'), (e) => ["
        "e.localName, e.namespaceURI, e.getAttributeNames(), e.getAttribute('href')])"
    )
    for tag, space, attributes, address in seen:
        assert tag in ALLOWED and space == "http://www.w3.org/1999/xhtml"
        assert set(attributes) <= {"href", "rel", "target", "class", "start", "type"}, attributes
        assert address is None or re.match(r"(https?:|mailto:)", address), address
    assert len(seen) < 10_000
    assert page.title() == title and "taken" not in title
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert all(address.startswith(scripted.url) for address in window.addresses)
    # The page goes on: the next question is asked, and the hostile answer travels with it as text.
    if name != "halves of characters":
        window.answer("Hello")
        sent = scripted.asked[-1]["messages"]
        if len(sent) == 3:  # or it was too long for the context, and the page says so
            assert sent[1]["content"] == whole
        else:
            assert page.locator(".left-out").count() == 1
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])


def _escaped(pieces: list[str]) -> str:
    """The events of an answer, with JSON's escapes."""
    chunks: list[Any] = [
        {"choices": [{"delta": {"content": one}, "finish_reason": None}]} for one in pieces
    ]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(one)}\n\n" for one in chunks) + "data: [DONE]\n\n"


def test_without_the_parsers_care_the_purifier_and_the_policy_hold(
    window: Window, scripted: Scripted
) -> None:
    page = window.page
    page.evaluate(
        "() => { const ours = window.DOMPurify.sanitize; window.seen = [];"
        " window.DOMPurify.sanitize = (html, wishes) =>"
        ' ours.call(window.DOMPurify, html + \'<img src=x onerror="window.taken=1"><a href="javascript:x">l</a>\''
        " + '<b onclick=x id=y style=color:red>z</b><form><input></form>', wishes); }"
    )
    window.answer("Hello")
    page.wait_for_timeout(200)
    assert page.evaluate("window.taken") is None
    assert (
        page.locator("li.answer .text :is(img, form, input, [onclick], [id], [style])").count() == 0
    )
    assert page.locator("li.answer .text a[href]").count() == 0
    page.evaluate(
        "() => { const e = document.createElement('div'); e.innerHTML = '<img src=x onerror=\"window.taken=1\">';"
        " document.body.append(e); const s = document.createElement('script'); s.textContent = 'window.taken=2';"
        " document.body.append(s); }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.taken") is None
    assert any("Content Security Policy" in problem for problem in window.problems)
    window.problems.clear()
