"""The program of the process that renders chat templates; ``chat_template.py`` starts and watches it.

A chat template comes with a model and is a program: it may loop for ever or ask for any amount of memory, at compile
time already. So it is compiled and rendered here, where nothing is lost when the process is ended. The environment is
that of transformers' ``apply_chat_template`` (``utils/chat_template_utils.py``), so the text is the same. Started by
path with only jinja2 within reach: this file imports nothing of conmoe_edge.

Requests and replies are JSON objects, one a line, over standard input and output. Memory: 20 MiB, 10 of them its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_CPU_MARGIN = 2.0  # seconds after which the system ends what the watching process did not


class Generation(Extension):
    """``{% generation %}``: marks what is the assistant's for training; the text is that of its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """A call block, as transformers makes one, so that names are scoped as there."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller: Callable[[], str]) -> str:
        return caller()


class DictMaker:
    """``dict`` for templates: it makes one and has nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args, **kwargs)


class PlainNamespace(Namespace):
    """``namespace`` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that namespace(self=...) works
        values = dict(*args, **kwargs)
        for name in values:
            PlainNamespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the namespace takes no name like {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(style: str) -> str:
    return datetime.now().strftime(style)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    """Without a loader: a template reaches no file and no other template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = DictMaker()
    environment.globals["namespace"] = PlainNamespace
    return environment


_environment = make_environment()


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    return _environment.from_string(source)


def looked_for(source: str) -> list[str]:
    """The constants that a template compares with, calls with, or goes through: what it may look for in a message."""
    tree = _environment.parse(source)
    asking = (nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)
    places: list[nodes.Node] = list(tree.find_all(asking))
    places += [node.iter for node in tree.find_all(nodes.For)]
    values = (node.node for node in tree.find_all(nodes.Assign))
    found = {value.value for value in values if isinstance(value, nodes.Const)}
    for place in places:
        found |= {const.value for const in _constants(place)}
    return sorted(one for one in found if isinstance(one, str) and one)


def _constants(node: nodes.Node) -> Iterator[nodes.Const]:
    if isinstance(node, nodes.Const):
        yield node
    yield from node.find_all(nodes.Const)


class TooLong(Exception):
    """A template writes more than it may."""


def _render(request: dict[str, Any]) -> dict[str, Any]:
    """The first conversation's text, and of the others what can be had."""
    template = _compiled(request["template"])
    first, *others = request["conversations"]
    variables, most = request["variables"], request["characters"]
    texts: list[str | None] = [_text(template, first, variables, most)]
    for messages in others:
        try:
            texts.append(_text(template, messages, variables, most))
        except MemoryError:
            raise
        except Exception:  # whatever the template's own code raises
            texts.append(None)
    return {"texts": texts}


def _text(template: Template, messages: Any, variables: dict[str, Any], most: int) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(messages=messages, **variables):
        length += len(piece)
        if length > most:
            raise TooLong
        pieces.append(piece)
    text = "".join(pieces)
    text.encode("utf-8")  # half a surrogate pair is no text, and an error of the template's
    return text


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request; what goes wrong in a template is a reply too."""
    try:
        if "conversations" in request:
            return _render(request)
        return {"texts": looked_for(request["template"])}
    except MemoryError:
        return {"error": "memory"}
    except TooLong:
        return {"error": "length"}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "why": f"line {error.lineno}: {_short(error.message)}"}
    except TemplateError as error:
        return {"error": "refused", "why": _short(error.message)}
    except Exception as error:  # whatever the template's own code raises
        return {"error": "failed", "why": f"{type(error).__name__}: {_short(error)}"}


def _short(value: Any) -> str:
    return str(value)[:200].encode("utf-8", "replace").decode("utf-8")


def limit_itself(memory: int) -> None:
    """Where the system can: no more than ``memory`` bytes on top of what is there, no file written, no core."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        held = pages * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))


def _limit_time(seconds: float) -> None:
    """For the case that the process that watches is gone."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        until = math.ceil(time.process_time() + seconds + _CPU_MARGIN)
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (until, hard))


def serve(memory: int) -> None:
    """Answer until the input ends."""
    limit_itself(memory)
    with os.fdopen(0, "rb") as requests, os.fdopen(1, "wb") as replies:
        for line in requests:
            request = json.loads(line)
            _limit_time(request["seconds"])
            reply = answer(request)
            replies.write(json.dumps(reply, ensure_ascii=False).encode("utf-8") + b"\n")
            replies.flush()
