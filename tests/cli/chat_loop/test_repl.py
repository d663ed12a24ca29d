"""The conversation loop, driven by lines instead of a terminal, and by a session without a model.

It stands in for the rendering and the commands only; ``test_cli_real.py`` runs the true one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conmoe_edge.cli.chat_loop.conversation import Conversation
from conmoe_edge.cli.chat_loop.repl import COMMANDS, Repl
from conmoe_edge.cli.ui.output import Output
from conmoe_edge.errors import ContextFull
from conmoe_edge.offload.fastpath.report import FastPathReport
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings
from conmoe_edge.offload.generation.session import TurnStats
from conmoe_edge.offload.runtime import RuntimeStats

MEMORY = RuntimeStats(
    hits=94,
    misses=6,
    bytes_read=6 << 20,
    prototypes=100,
    resident=87,
    slots=87,
    slot_bytes=87 << 20,
    memory_used=3_328_599_654,
    memory_budget=4 * 10**9,
    device="cpu",
    kernel="native, AVX2",
)


class Session:
    """Answers with the pieces it was given, and remembers what it was asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = [list(answer) for answer in answers]
        self.asked: list[list[Mapping[str, str]]] = []
        self.settings: list[SamplingSettings] = []
        self.runtime = SimpleNamespace(
            stats=lambda: MEMORY, fast_path=FastPathReport((), "no layer: a reason")
        )
        self.context = 4096
        self.context_used = 0
        self.last: TurnStats | None = None
        self.finish: Any = "stop"
        self.before_piece = lambda: None

    def forget(self) -> None:
        self.context_used = 0

    def count(self, messages: Sequence[Mapping[str, str]]) -> int:
        return sum(len(one["content"]) for one in messages)

    def reply(
        self,
        messages: Sequence[Mapping[str, str]],
        settings: SamplingSettings,
        *,
        stop_event: threading.Event,
    ) -> Iterator[str]:
        self.asked.append(list(messages))
        self.settings.append(settings)
        for piece in self.answers.pop(0):
            self.before_piece()
            if stop_event.is_set():
                break
            yield piece
        self.context_used = 1204
        self.last = TurnStats(412, 20, 0.4, 31.2, 94, 6, 6 << 20, 1204, self.finish)
        if self.finish == "context":
            raise ContextFull("The conversation needs 4097 tokens.", "nothing was cut", "--context")


class Lines:
    """A keyboard: text, or an exception to raise."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)
        self.drafts: list[str] = []

    def read(self, default: str = "") -> str:
        self.drafts.append(default)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a conversation; gives (repl, stdout, stderr)."""

    def run(session: Session, *lines: str | type[BaseException]) -> tuple[Repl, str, str]:
        stand_in: Any = session
        repl = Repl(stand_in, Output(), name="out")
        repl.run(Lines(*lines))
        seen = capsys.readouterr()
        return repl, seen.out, seen.err

    return run


def contents(messages: Sequence[Mapping[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_answers_go_to_stdout_and_the_footer_to_stderr(talk: Any) -> None:
    _, out, err = talk(Session(["Hel", "lo"]), "hi")
    assert out == "Hello\n"
    assert err.strip() == (
        "412 tokens · 31.2 tok/s · first token 0.4 s · RAM 3.10/3.73 GiB · "
        "prototypes 87 % resident, hit 94 % · context 1,204/4,096"
    )


def test_each_question_goes_with_everything_before_it(talk: Any) -> None:
    session = Session(["b"], ["d"])
    talk(session, "/system be brief", "a", "", "  c  ")
    assert contents(session.asked[1]) == ["be brief", "a", "b", "c"]
    assert [m["role"] for m in session.asked[1]] == ["system", "user", "assistant", "user"]


def test_settings_reach_the_session(talk: Any) -> None:
    session = Session(["x"])
    talk(session, "/set temperature 0.6", "/set top_p=0.9", "a")
    assert session.settings[0] == SamplingSettings(temperature=0.6, top_p=0.9)


def test_ctrl_c_stops_the_answer_and_not_the_program(talk: Any) -> None:
    session = Session(["a", "b", "c"], ["next"])
    beats = iter([None, None, signal.SIGINT, *[None] * 9])

    def maybe_interrupt() -> None:
        if (number := next(beats)) is not None:
            os.kill(os.getpid(), number)

    session.before_piece = maybe_interrupt
    repl, out, err = talk(session, "one", "two")
    assert out == "ab\nnext\n"
    assert "Stopped." in err
    assert contents(repl.conversation.messages) == ["one", "ab", "two", "next"]


def test_ctrl_c_before_the_first_piece_keeps_nothing(talk: Any) -> None:
    session = Session(["a"])
    session.before_piece = lambda: os.kill(os.getpid(), signal.SIGINT)
    repl, _, err = talk(session, "one")
    assert "not kept" in err
    assert repl.conversation.messages == []


def test_a_second_ctrl_c_gets_out_of_a_step_that_does_not_look(talk: Any) -> None:
    session = Session(["a"], ["b"])
    twice = iter([2, 0])

    def interrupt() -> None:
        for _ in range(next(twice)):
            os.kill(os.getpid(), signal.SIGINT)

    session.before_piece = interrupt
    repl, out, err = talk(session, "one", "two")
    assert "not kept" in err
    assert "b" in out
    assert contents(repl.conversation.messages) == ["two", "b"]


def test_leaving(talk: Any) -> None:
    assert "Ctrl-C again leaves" in talk(Session(), KeyboardInterrupt, KeyboardInterrupt, "x")[2]
    talk(Session(["a"]), KeyboardInterrupt, "q", KeyboardInterrupt, "/bye", "never")
    for word in ("/bye", "/quit", "/exit"):
        session = Session(["a"])
        talk(session, word, "never")
        assert session.asked == []


def test_a_full_context_is_said_and_nothing_is_cut(talk: Any) -> None:
    session = Session(["partial"], ["fresh"])
    session.finish = "context"
    repl, out, err = talk(session, "long")
    assert out == "partial\n"
    assert "error: The conversation needs 4097 tokens." in err
    assert "nothing was cut" in err
    assert "/clear" in err
    assert contents(repl.conversation.messages) == ["long", "partial"]


def test_no_room_for_an_answer_leaves_the_conversation_as_it_was(talk: Any) -> None:
    session = Session([])
    session.finish = "context"
    repl, _, err = talk(session, "long")
    assert "a shorter message" in err
    assert repl.conversation.messages == []


def test_an_answer_that_was_cut_says_so(talk: Any) -> None:
    session = Session(["x"])
    session.finish = "length"
    assert "/set max_tokens 824" in talk(session, "a")[2]


def test_retry_asks_the_same_again(talk: Any) -> None:
    session = Session(["bad"], ["good"])
    repl, out, _ = talk(session, "q", "/retry")
    assert out == "bad\ngood\n"
    assert contents(session.asked[1]) == ["q"]
    assert contents(repl.conversation.messages) == ["q", "good"]


def test_a_retry_that_fails_keeps_the_answer_that_was_there(talk: Any) -> None:
    session = Session(["kept"], [])
    repl, _, _ = talk(session, "q", "/retry")
    assert contents(repl.conversation.messages) == ["q", "kept"]
    assert "no answer to take back" in talk(Session(), "/retry")[2]


def test_save_clear_load(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "a chat.json"
    session = Session(["b"], ["d"])
    repl, _, err = talk(
        session, "/system s", "a", f"/save '{path}'", "/clear", f"/load '{path}'", "c"
    )
    assert "Saved 2 messages" in err
    assert "Loaded 2 messages" in err
    assert contents(session.asked[1]) == ["s", "a", "b", "c"]
    assert Conversation.load(path).system == "s"
    assert len(repl.conversation.messages) == 4


def test_clear_forgets_the_messages_and_keeps_the_system_text(talk: Any) -> None:
    session = Session(["b"], ["d"])
    _, _, err = talk(session, "/system s", "a", "/clear", "c", "/context")
    assert contents(session.asked[1]) == ["s", "c"]
    assert "1,204 of 4,096 tokens used" in err


@pytest.mark.parametrize("line", ["/hlep", "/set warmth 3", "/save", "/load no-such", "/set x"])
def test_a_wrong_command_says_how_and_the_chat_goes_on(talk: Any, line: str) -> None:
    session = Session(["still here"])
    _, out, err = talk(session, line, "hi")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert out == "still here\n"


def test_did_you_mean_and_messages_that_begin_with_a_slash(talk: Any) -> None:
    session = Session(["ok"])
    _, _, err = talk(session, "/hlep", " /etc/passwd is a file")
    assert "/help" in err
    assert contents(session.asked[0]) == ["/etc/passwd is a file"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_knows_every_command(talk: Any, name: str) -> None:
    assert name in talk(Session(), "/help")[2]


def test_numbers_before_and_after_the_first_answer(talk: Any) -> None:
    _, _, err = talk(Session(["x"]), "/stats", "/cache", "a", "/stats", "/cache")
    assert "no answer yet" in err
    assert "31.20 tokens a second" in err
    assert "ended by the model" in err
    assert "94.0 % of the last answer's requests" in err
    assert err.count("native, AVX2") == err.count("no layer: a reason") == 2


def test_a_runtime_without_a_fast_path_shows_none(talk: Any) -> None:
    session = Session()
    session.runtime.fast_path = None
    err = talk(session, "/stats")[2]
    assert "native, AVX2" in err and "fast path" not in err


def test_a_full_context_leaves_the_oldest_turns_out_and_says_so(talk: Any) -> None:
    """A letter is a token here."""
    session = Session(["b" * 20], ["d" * 20], ["f" * 20], ["h"])
    session.context = 64
    repl, _, err = talk(session, "/system S", "a" * 10, "c" * 10, "e" * 10, "g")
    sent = [contents(one) for one in session.asked]
    assert sent[0] == ["S", "a" * 10]
    assert sent[1] == ["S", "a" * 10, "b" * 20, "c" * 10]
    assert sent[2] == ["S", "e" * 10], "half of the context is made free at once"
    assert sent[3] == ["S", "e" * 10, "f" * 20, "g"], "and so nothing more for the next question"
    assert err.count("are no longer sent") == 1
    assert "the oldest 4 messages" in err and "the system text and 0 messages" in err
    assert len(repl.conversation.messages) == 8, "what is left out is kept for /save"


def test_stop_asks_instead(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(["b" * 60], ["d"])
    session.context = 64
    stand_in: Any = session
    repl = Repl(stand_in, Output(), name="out", on_full="stop")
    repl.run(Lines("a", "c"))
    assert contents(session.asked[1]) == ["a", "b" * 60, "c"]
    assert "no longer sent" not in capsys.readouterr().err


def test_a_question_alone_is_never_left_out(talk: Any) -> None:
    session = Session(["b"])
    session.context = 8
    talk(session, "a" * 20)
    assert contents(session.asked[0]) == ["a" * 20], "the session says that there is no room"


def test_edit_asks_the_last_question_changed(talk: Any) -> None:
    session = Session(["one"], ["two"], ["three"])
    repl, _, _ = talk(session, "first", "second", "/edit third")
    assert contents(session.asked[2]) == ["first", "one", "third"]
    assert contents(repl.conversation.messages) == ["first", "one", "third", "three"]


def test_edit_alone_puts_the_question_into_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(["one"], ["two"])
    stand_in: Any = session
    lines = Lines("first", "/edit", "changed")
    repl = Repl(stand_in, Output(), name="out")
    repl.run(lines)
    assert lines.drafts == ["", "", "first", ""]
    assert contents(repl.conversation.messages) == ["changed", "two"]
    assert "taken back" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["/edit", "/edit text", "/copy", "/retry"])
def test_before_the_first_answer_there_is_nothing_to_change(talk: Any, command: str) -> None:
    _, _, err = talk(Session(), command)
    assert "There is no" in err and "type a message first" in err


def test_settings_are_commands_too(talk: Any) -> None:
    session = Session(["x"], ["y"])
    talk(session, "/top_k 40", "/top-p 0.9", '/stop "the end" ###', "a", "/stop default", "b")
    assert session.settings[0] == SamplingSettings(top_k=40, top_p=0.9, stop=("the end", "###"))
    assert session.settings[1].stop == ()


def test_a_loaded_conversation_is_shown(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    turns = [(f"question {n}", f"answer\x1b[31m {n}") for n in range(12)]
    talk(Session(*[[answer] for _, answer in turns]), *(q for q, _ in turns), f"/save {path}")
    _, _, err = talk(Session(), f"/load {path}")
    assert "(4 earlier messages)" in err and "question 1\n" not in err
    for n in range(2, 12):
        assert f"> question {n}\n" in err and f"answer[31m {n}\n" in err
    assert "\x1b" not in err and "Loaded 24 messages." in err


def test_copy_uses_the_program_of_the_system(
    talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "pbcopy"
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/copied\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _, out, err = talk(Session(["größe"]), "a", "/copy")
    assert (tmp_path / "copied").read_text() == "größe" and "Copied by pbcopy." in err
    assert out == "größe\n"
    program.unlink()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    _, out, err = talk(Session(["größe"]), "a", "/copy")
    assert "\x1b]52;c;Z3LDtsOfZQ==\a" in out and "the terminal" in err
