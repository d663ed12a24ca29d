"""Conversations in the browser: kept, found again, renamed, deleted, exported; questions edited, answers made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.page_window import Window, settles
from tests.serve.scripted_server import Script, Scripted, words

pytestmark = pytest.mark.browser


def titles(page: Any) -> list[str]:
    return page.locator("#conversations .open span").all_inner_texts()


def menu(page: Any, title: str, action: str) -> None:
    row = page.locator("#conversations li", has_text=title)
    row.locator("summary").click()
    row.locator(f"[data-action={action}]").click()


def downloaded(window: Window, do: Any) -> tuple[str, str]:
    with window.page.expect_download() as waiting:
        do()
    found = waiting.value
    return found.suggested_filename, Path(found.path()).read_text(encoding="utf-8")


def test_they_are_there_after_a_reload_and_in_another_tab(
    window: Window, scripted: Scripted
) -> None:
    scripted.says("First <b>?", "An *answer*.")
    window.answer("First <b>?")
    window.page.click("#new")
    window.answer("Second?")
    assert titles(window.page) == ["Second?", "First <b>?"]
    window.page.reload()
    window.ready()
    settles(window.page.locator("li.mine .text"), "Second")
    window.page.locator("#conversations .open").nth(1).click()
    settles(window.page.locator("li.mine .text"), "First <b>")
    assert window.page.locator("li.answer em").inner_text() == "answer"
    window.answer("More?")
    assert [one["content"] for one in scripted.asked[-1]["messages"]] == [
        "First <b>?",
        "An *answer*.",
        "More?",
    ]
    other = window.tab()
    other.wait_for_selector("#state[data-state=ready]")
    settles(other.locator("#conversations .open span").first, "First")
    assert titles(other) == ["First <b>?", "Second?"]
    assert other.locator("li").filter(has_text="More?").count() == 0, "a new tab begins anew"


def test_rename_delete_and_export(window: Window, scripted: Scripted) -> None:
    scripted.says("One?", "```js\nx\n```\n")
    page = window.page
    window.answer("One?")
    menu(page, "One?", "rename")
    page.fill("#one-value", "Rivers & <i>seas</i>")
    page.press("#one-value", "Enter")
    settles(page.locator("#conversations .open span"), "^Rivers & <i>seas</i>$")
    name, text = downloaded(window, lambda: menu(page, "Rivers", "markdown"))
    assert name == "Rivers-i-seas-i.md"
    assert text == "# Rivers & <i>seas</i>\n\n## You\n\nOne?\n\n## river-30b\n\n```js\nx\n```\n\n"
    name, text = downloaded(window, lambda: menu(page, "Rivers", "json"))
    (kept,) = json.loads(text)["conversations"]
    assert [one["content"] for one in kept["nodes"].values()] == ["One?", "```js\nx\n```\n"]
    page.click("#new")
    window.answer("Two?")
    name, text = downloaded(window, lambda: page.click("#export-all"))
    assert len(json.loads(text)["conversations"]) == 2
    menu(page, "Rivers", "delete")
    assert "Rivers & <i>seas</i>" in page.inner_text("#one-text")
    page.keyboard.press("Escape")
    page.wait_for_timeout(200)
    assert len(titles(page)) == 2, "Escape deletes nothing"
    menu(page, "Two?", "delete")
    page.click("#one-yes")
    settles(page.locator("#conversations"), "^Rivers[^T]*$")
    assert page.is_visible("#welcome"), "what was shown is gone"
    page.reload()
    window.ready()
    settles(page.locator("#conversations .open span"), "Rivers")
    assert titles(page) == ["Rivers & <i>seas</i>"]


def test_regenerate_keeps_the_answer_before(window: Window, scripted: Scripted) -> None:
    scripted.says("Again?", "First.", "Second.")
    item = window.answer("Again?")
    item.locator("[data-action=retry]").click()
    window.answered()
    assert window.answers() == ["Second."]
    assert [one["messages"] for one in scripted.asked] == [
        [{"role": "user", "content": "Again?"}]
    ] * 2
    assert window.page.inner_text(".actions .count") == "2 of 2"
    window.page.click("[data-action=before]")
    assert window.answers() == ["First."]
    window.answer("On?")
    assert scripted.asked[-1]["messages"][1]["content"] == "First."
    window.page.locator("[data-action=after]").first.click()
    assert window.answers() == ["Second."], "what followed the first one is with it"
    window.page.reload()
    window.ready()
    settles(window.page.locator("li.answer .text"), "Second")
    window.page.locator("[data-action=before]").first.click()
    assert window.answers() == ["First.", "Yes."]


def test_a_question_is_edited_and_the_conversation_goes_on_from_there(
    window: Window, scripted: Scripted
) -> None:
    window.answer("Red?")
    window.answer("Green?")
    window.answer("Blue?")
    page = window.page
    page.locator("li.mine").nth(1).locator("[data-action=edit]").click()
    page.fill("form.edit textarea", "Yellow?")
    page.keyboard.press("Escape")
    assert page.locator("form.edit").count() == 0
    page.locator("li.mine").nth(1).locator("[data-action=edit]").click()
    assert page.input_value("form.edit textarea") == "Green?"
    page.fill("form.edit textarea", "Yellow?")
    page.press("form.edit textarea", "Enter")
    page.wait_for_selector("li.mine:has-text('Yellow?')")
    window.answered()
    assert page.locator("li.mine .text").all_inner_texts() == ["Red?", "Yellow?"]
    sent = [one["content"] for one in scripted.asked[-1]["messages"]]
    assert sent == ["Red?", "Yes.", "Yellow?"]
    page.locator("li.mine").nth(1).locator("[data-action=before]").click()
    assert page.locator("li.mine .text").all_inner_texts() == ["Red?", "Green?", "Blue?"]


def test_another_conversation_may_be_opened_while_one_is_answered(
    window: Window, scripted: Scripted
) -> None:
    scripted.says("Slow?", Script(words("a b c d e f g h " * 20), pace=0.05))
    window.answer("Quick?")
    window.page.click("#new")
    window.ask("Slow?")
    settles(window.page.locator("li.answer .text"), "a b c")
    window.page.locator("#conversations .open", has_text="Quick?").click()
    window.answered()
    assert window.page.locator("li.mine .text").all_inner_texts() == ["Quick?"]
    window.page.locator("#conversations .open", has_text="Slow?").click()
    settles(window.page.locator("li.answer .text"), "^a b c")
    assert "stopped" in window.page.inner_text("li.answer .under")


def test_a_full_browser_says_so_and_goes_on(window: Window, scripted: Scripted) -> None:
    devtools = window.context.new_cdp_session(window.page)
    devtools.send("Storage.overrideQuotaForOrigin", {"origin": scripted.url, "quotaSize": 200_000})
    scripted.says("Long?", "word " * 100_000)
    window.answer("Long?")
    settles(window.page.locator("#storage-problem"), "no more room")
    assert window.page.locator("li.answer .plain").count() == 1, "what was said is there"
    devtools.send("Storage.overrideQuotaForOrigin", {"origin": scripted.url})
    window.page.click("#new")
    window.answer("Short?")
    window.page.wait_for_selector("#storage-problem[hidden]", state="attached")


def test_without_storage_the_page_works(window: Window) -> None:
    page = window.page
    page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined });")
    page.reload()
    window.ready()
    assert "keeps no conversations" in page.inner_text("#storage-problem")
    window.answer("Hello?")
    assert window.answers() == ["Yes."]


def test_settings_are_sent_and_kept(window: Window, scripted: Scripted) -> None:
    page = window.page
    window.answer("Plain?")
    assert set(scripted.asked[-1]) == {"model", "messages", "stream", "stream_options"}
    page.click("#settings > summary")
    given = {"temperature": "0.7", "top-p": "0.9", "top-k": "40", "min-p": "0.05"}
    for name, value in {**given, "max-tokens": "50", "seed": "7", "system": "Be short."}.items():
        page.fill(f"#{name}", value)
    page.select_option("#reasoning", "low")
    window.answer("Set?")
    body = scripted.asked[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7}
    assert {**body, **wanted, "max_tokens": 50, "reasoning_effort": "low"} == body
    page.reload()
    window.ready()
    window.answer("Kept?")
    assert scripted.asked[-1]["temperature"] == 0.7
    page.click("#settings > summary")
    page.fill("#temperature", "9")
    item = window.answer("Wrong?")
    assert "Temperature" in item.locator(".problem").inner_text()
    page.click("#settings-reset")
    window.answer("Plain again?")
    assert set(scripted.asked[-1]) == {"model", "messages", "stream", "stream_options"}


def test_one_of_several_models_is_chosen(window: Window, scripted: Scripted) -> None:
    page = window.page
    assert not page.is_visible("#models") and page.inner_text("#model") == "river-30b"
    scripted.names = ["river-30b", "sea-7b", "<b>lake</b>"]
    listed = [{"name": "sea-7b", "state": "unloaded", "loaded": False}]
    nothing = {"memory": None, "prompts": None, "compute": None, "cache": None, "context": None}
    scripted.stats_of["sea-7b"] = {"model": "sea-7b", "models": listed, **nothing}
    page.reload()
    window.ready()
    page.wait_for_selector("#models:not([hidden])")
    assert page.locator("#models option").all_inner_texts() == scripted.names
    window.answer("First?")
    assert page.is_visible("#tiers")
    page.select_option("#models", "sea-7b")
    settles(page.locator("#state"), "loads when it is asked")
    assert not page.is_visible("#tiers"), "the figures are of the other one"
    window.answer("Second?")
    assert [one["model"] for one in scripted.asked] == ["river-30b", "sea-7b"]
