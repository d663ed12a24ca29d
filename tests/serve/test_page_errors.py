"""What goes wrong is said in the conversation, beside the message that failed, with what can be done about it."""

from __future__ import annotations

from typing import Any

import pytest

from conmoe_edge.offload.generation.answer_parts import Said
from conmoe_edge.serve.http_errors import ApiError
from tests.serve.page_window import SIZES, Window, settles
from tests.serve.scripted_server import Script, Scripted, scripted_server, words

pytestmark = pytest.mark.browser


def busy(status: int, seconds: int) -> Script:
    message = f"Too many requests are waiting. Try again in about {seconds} s."
    headers = {"Retry-After": str(seconds)}
    return Script(refused=ApiError(status, message, code="queue_full", headers=headers))


def users(body: dict[str, Any]) -> list[str]:
    return [one["content"] for one in body["messages"] if one["role"] == "user"]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_by_itself(
    window: Window, scripted: Scripted, status: int
) -> None:
    scripted.says("Now?", busy(status, 2), busy(status, 1), Script([Said("Here.")]))
    window.ask("Now?")
    settles(window.page.locator(".waiting [role=status]"), "Trying again in [12] s")
    window.answered()
    assert window.answers() == ["Here."] and len(scripted.asked) == 3
    assert window.page.locator(".waiting").count() == 0


def test_a_wait_is_cut_short_or_stopped(window: Window, scripted: Scripted) -> None:
    scripted.says("Now?", busy(429, 600), Script([Said("Here.")]))
    window.ask("Now?")
    window.page.click("[data-action=try-now]")
    window.answered()
    assert window.answers() == ["Here."]
    scripted.says("Then?", busy(429, 600))
    window.ask("Then?")
    window.page.wait_for_selector(".waiting")
    window.page.keyboard.press("Escape")
    window.answered()
    assert "stopped" in window.page.locator("li.answer .under").last.inner_text()
    assert window.page.locator(".waiting").count() == 0
    window.answer("After?")
    assert users(scripted.asked[-1]) == ["Now?", "After?"], "what had no answer is not sent"
    assert window.page.locator("li.mine.unsent .text").inner_text() == "Then?"


def test_a_connection_that_breaks_keeps_what_came(window: Window, scripted: Scripted) -> None:
    scripted.says(
        "Tell.", Script(words("Once upon a"), breaks=True), Script([Said("Once upon a time.")])
    )
    item = window.answer("Tell.")
    assert item.locator(".text").inner_text().strip() == "Once upon a"
    problem = item.locator("[role=alert]")
    assert "connection ended before the answer did" in problem.inner_text()
    assert "kept above" in problem.inner_text()
    problem.locator("button").click()
    window.answered()
    assert window.answers() == ["Once upon a time."]
    assert window.page.locator("[role=alert]:visible").count() == 0
    window.page.click("[data-action=before]")
    assert "Once upon a" in window.answers()[0], "the piece is still to be had"


def test_a_server_that_stops_and_comes_back(browser: Any) -> None:
    with scripted_server() as first:
        first.says("Tell.", Script([Said("Hello.")]))
        window = Window(browser, first.url, SIZES["desktop"])
        window.ready()
        window.answer("Tell.")
        port = int(first.url.rsplit(":", 1)[1])
    item = window.answer("Still there?")
    assert "cannot be reached" in item.locator("[role=alert]").inner_text()
    assert "serve" in item.locator(".hint").inner_text()
    settles(window.page.locator("#state"), "does not answer")
    with scripted_server(port) as second:
        item.locator("[data-action=retry]").click()
        window.answered()
        assert window.answers()[-1] == "Yes."
        assert users(second.asked[-1]) == ["Tell.", "Still there?"]
        settles(window.page.locator("#state"), "ready")
    window.close()


def test_a_failure_in_the_middle_says_what_the_server_said(
    window: Window, scripted: Scripted
) -> None:
    failed = ApiError(500, "Something failed inside the server; its log says more.")
    scripted.says("Tell.", Script(words("One two"), fails=failed))
    item = window.answer("Tell.")
    assert "its log says more" in item.locator("[role=alert]").inner_text()
    assert item.locator("[role=alert] [data-action=retry]").inner_text() == "Retry"
    scripted.says("And?", Script(refused=ApiError(400, "temprature is <b>unknown</b>.")))
    item = window.answer("And?")
    assert "temprature is <b>unknown</b>." in item.locator("[role=alert]").inner_text()
    assert users(scripted.asked[-1]) == ["Tell.", "And?"]


def test_a_key_that_is_called_off_can_be_given_later(browser: Any, scripted: Scripted) -> None:
    scripted.key = "secret"
    window = Window(browser, scripted.url, SIZES["desktop"])
    page = window.page
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    settles(page.locator("#state"), "API key")
    window.ask("Hello?")
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    window.answered()
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    assert "API key" in page.inner_text("li.answer [role=alert]")
    page.locator("[role=alert] [data-action=retry]").click()
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-wrong:not([hidden])")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    settles(page.locator("li.answer .text"), "^Yes")
    window.ready()
    window.close()


def filled(window: Window, scripted: Scripted, turns: int) -> None:
    for number in range(turns):
        scripted.says(f"Question {number}?", f"answer{number} " * 100)
        window.answer(f"Question {number}?")


def test_old_turns_are_left_out_and_it_is_said_each_time(
    window: Window, scripted: Scripted
) -> None:
    window.setting("system", "Be short.")
    scripted.context = scripted.stats["context"] = 600
    window.page.reload()
    window.ready()
    filled(window, scripted, 5)
    assert window.page.locator(".left-out").count() == 0
    window.answer("Question 5?")
    assert "the oldest 6 messages are no longer sent" in window.page.inner_text(".left-out")
    assert users(scripted.asked[-1]) == ["Question 3?", "Question 4?", "Question 5?"]
    assert scripted.asked[-1]["messages"][0] == {"role": "system", "content": "Be short."}
    assert window.page.locator("li.mine").count() == 6, "all of it stays to be read"
    window.answer("Question 6?")
    assert users(scripted.asked[-1])[0] == "Question 3?", "they stay out"
    assert window.page.locator(".left-out").count() == 1
    for number in range(7, 11):
        scripted.says(f"Question {number}?", f"answer{number} " * 100)
        window.answer(f"Question {number}?")
    assert window.page.locator(".left-out").count() >= 2, "each time"
    window.page.reload()
    window.ready()
    window.page.wait_for_selector(".left-out")
    assert window.page.locator(".left-out").count() >= 2


def test_a_context_that_is_not_known_is_found_by_the_refusal(
    window: Window, scripted: Scripted
) -> None:
    del scripted.stats["context"]
    scripted.context = 400
    window.page.reload()
    window.ready()
    filled(window, scripted, 5)
    assert window.page.locator(".left-out").count() >= 1
    assert window.page.locator("[role=alert]:visible").count() == 0
    assert users(scripted.asked[-1])[-1] == "Question 4?"


def test_with_stop_a_full_context_is_an_error_with_a_way_out(
    window: Window, scripted: Scripted
) -> None:
    page = window.page
    window.setting("on-full", "stop")
    scripted.context = scripted.stats["context"] = 400
    filled(window, scripted, 4)
    item = window.answer("Question 5?")
    problem = item.locator("[role=alert]")
    assert "The context is full" in problem.inner_text()
    assert "400" in problem.inner_text()
    problem.locator("[data-action=retry-shorter]").click()
    page.wait_for_selector(".left-out")
    window.answered()
    assert window.answers()[-1] == "Yes."
    assert users(scripted.asked[-1])[0] == "Question 1?"


def test_what_the_server_left_out_is_said(window: Window, scripted: Scripted) -> None:
    scripted.says("Hm?", Script([Said("Yes.")], headers={"X_Conmoe_Ignored": "reasoning_effort"}))
    item = window.answer("Hm?")
    assert "left out by the server: reasoning_effort" in item.locator(".under").inner_text()


def test_an_answer_that_is_cut_or_empty_says_so(window: Window, scripted: Scripted) -> None:
    scripted.says("Long?", Script([Said("One")], finish="length"))
    assert "cut" in window.answer("Long?").locator(".under").inner_text()
    scripted.says("Empty?", Script([], tokens=0))
    assert "an empty answer" in window.answer("Empty?").locator(".under").inner_text()
