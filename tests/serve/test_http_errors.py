"""Exceptions as OpenAI's errors."""

from __future__ import annotations

from conmoe_edge.serve.http_errors import as_api_error


def test_a_bug_says_nothing_of_the_inside() -> None:
    error = as_api_error(RuntimeError("secret path /home/me"))
    assert error.status == 500
    assert "secret" not in str(error.body)
