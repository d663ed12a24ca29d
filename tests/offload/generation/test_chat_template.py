"""Chat templates in their process: the same text as transformers, and an end to whatever has none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from conmoe_edge.errors import ConmoeError, PackageError, UsageError
from conmoe_edge.offload.generation import chat_template
from conmoe_edge.offload.generation.chat_template import TemplateRenderer
from conmoe_edge.offload.generation.prompt import template_variables, template_view
from tests import small_tokenizers
from tests.chat_templates import ALL, CHATML
from tests.patience import PATIENCE, wait_for

HELLO = [{"role": "user", "content": "Hello"}]
SIMPLE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": " Two\n\nparagraphs  \n"}],
    "empty": [{"role": "user", "content": ""}],
    "whole": [
        {"role": "system", "content": "Be brief. /no_think"},
        {"role": "user", "content": 'Quote "this" \\ {{ that }} {% raw %} \u4e2d\u6587'},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nAn answer."},
        {"role": "user", "content": "<tool_response>x</tool_response>"},
        {"role": "assistant", "content": "<think>cut off"},
        {"role": "user", "content": "And then? /nothink"},
    ],
    "reasons": [
        {"role": "user", "content": "Why?", "name": None},
        {"role": "assistant", "content": "So.", "reasoning": "hm"},
        {"role": "user", "content": "And?"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " a part "}]}],
    "refused": [{"role": "assistant", "content": "I begin."}],
}


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    found = TemplateRenderer()
    yield found
    found.close()


def _by_transformers(tokenizer: Any, messages: list[dict[str, Any]]) -> str | None:
    """``None`` where the template or transformers fails."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception:
        return None


@pytest.mark.parametrize("name", ALL)
def test_the_text_is_that_of_transformers(renderer: TemplateRenderer, name: str) -> None:
    tokenizer = small_tokenizers.make("byte-bpe")
    tokenizer.chat_template = ALL[name]
    seen = 0
    for messages in CONVERSATIONS.values():
        wanted = _by_transformers(tokenizer, messages)
        plain = [template_view(message) for message in messages]
        try:
            (text,) = renderer.render(ALL[name], [plain], template_variables(tokenizer))
        except UsageError:
            text = None
        assert text == wanted
        seen += wanted is not None
    assert seen >= 3


HOSTILE = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{% if n %}{{ f(n-1) + f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a text at compile time": "{{ 'x' * 10**10 }}",
    "a list": "{{ [0] * 10**10 }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "another format": "{{ '{:>1000000000}'.format(1) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "ljust": "{{ messages[0].content.ljust(10**10) }}",
    "join": "{{ ('x' * 10**7) | list | join('y' * 1000) }}",
    "indent": "{{ ('x\n' * 10**6) | indent(10**6) }}",
    "tojson": "{{ dict.fromkeys(range(99999)) | tojson(indent=10**9) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "lipsum": "{{ lipsum(10**7) }}",
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "a long sum": "{{ " + "[0]+" * 100_000 + "[1] }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a macro without end": "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}",
    "much text": "{% for i in range(60000) %}{{ 'x' * 1000 }}{% endfor %}",
    "a long reason": "{{ raise_exception('x' * 10**9) }}",
    "half a character": "{{ '\\ud800' }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_template_comes_to_an_end(
    renderer: TemplateRenderer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.25)
    peak = _Peak(renderer)
    with peak, pytest.raises(UsageError) as caught:
        renderer.render(HOSTILE[name], [HELLO], {})
    assert caught.value.why and len(str(caught.value)) < 500
    assert peak.process < 400 << 20, "the limit and the process itself"
    assert peak.process > 0 and peak.own < 100 << 20, "nothing of it reached this process"
    # The next template is not the worse for it.
    assert renderer.render(SIMPLE, [HELLO], {}) == ["user: Hello\n"]


class _Peak:
    """The most that this process grew by, and that the renderer's took, while the block ran."""

    def __init__(self, renderer: TemplateRenderer) -> None:
        self.own = self.process = 0
        self._renderer = renderer
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        this = psutil.Process()
        before = this.memory_info().rss
        while not self._done.wait(0.005):
            self.own = max(self.own, this.memory_info().rss - before)
            with contextlib.suppress(psutil.Error):
                if self._renderer.pid is not None:
                    taken = psutil.Process(self._renderer.pid).memory_info().rss
                    self.process = max(self.process, taken)


@pytest.mark.parametrize(
    "source",
    [
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends 'x' %}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_it_reaches_nothing(renderer: TemplateRenderer, source: str) -> None:
    with pytest.raises(UsageError):
        renderer.render(source, [HELLO], {})


def test_what_is_no_template_is_the_packages_fault(renderer: TemplateRenderer) -> None:
    with pytest.raises(PackageError, match="line 2"):
        renderer.render("{{ 1 }}\n{% if %}", [HELLO], {})


def test_a_process_that_is_gone_is_replaced(renderer: TemplateRenderer) -> None:
    assert renderer.render(SIMPLE, [HELLO], {}) == ["user: Hello\n"]
    child = psutil.Process(renderer.pid)
    child.kill()
    child.wait(PATIENCE)
    assert renderer.render(SIMPLE, [HELLO], {}) == ["user: Hello\n"]


def test_threads_get_their_own_texts(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.3)
    wrong: list[str] = []

    def ask(number: int) -> None:
        for turn in range(20):
            said = f"{number} {turn}"
            if turn == 10 and number == 0:
                with pytest.raises(UsageError):
                    renderer.render(HOSTILE["a loop in a loop"], [HELLO], {})
            (text,) = renderer.render(SIMPLE, [[{"role": "user", "content": said}]], {})
            if text != f"user: {said}\n":
                wrong.append(str(text))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_who_is_gone_does_not_hold_it_up(renderer: TemplateRenderer) -> None:
    renderer.render(SIMPLE, [HELLO], {})
    gone = threading.Event()
    started = time.process_time()
    threading.Timer(0.1, gone.set).start()
    with pytest.raises(ConmoeError, match="Stopped"):
        renderer.render(HOSTILE["a loop in a loop"], [HELLO], {}, gone)
    assert time.process_time() - started < chat_template.CPU_SECONDS
    assert renderer.render(SIMPLE, [HELLO], {}) == ["user: Hello\n"]


def test_an_interrupt_leaves_no_answer_behind(renderer: TemplateRenderer) -> None:
    seen = threading.Event()

    def interrupt(*_: object) -> None:
        seen.set()
        raise KeyboardInterrupt

    def press() -> None:  # again where one came just before a thread went to sleep in a read
        while not seen.wait(0.2):
            os.kill(os.getpid(), signal.SIGINT)

    renderer.render(SIMPLE, [HELLO], {})
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        threading.Thread(target=press, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            renderer.render(HOSTILE["a loop in a loop"], [HELLO], {})
    finally:
        seen.set()
        signal.signal(signal.SIGINT, before)
    assert renderer.render(SIMPLE, [HELLO], {}) == ["user: Hello\n"]


def test_the_process_ends_with_its_parent() -> None:
    code = (
        "import os, psutil; from conmoe_edge.offload.generation.chat_template import shared;"
        f"shared.render({CHATML!r}, [{HELLO!r}], {{}});"
        "print(psutil.Process().children()[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    wait_for(lambda: _is_over(pid))


def _is_over(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_knows_no_secrets_and_little_memory(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONMOE_API_KEY", "secret")
    renderer.render(CHATML, [HELLO], {})
    child = psutil.Process(renderer.pid)
    assert "CONMOE_API_KEY" not in child.environ()
    assert child.memory_info().rss < 40 << 20
