"""``/set``."""

from __future__ import annotations

import pytest

from conmoe_edge.cli.chat_loop.set_command import setting_rows, with_setting
from conmoe_edge.errors import UsageError
from conmoe_edge.offload.generation.sampling_settings import SamplingSettings


def test_settings_change_one_at_a_time_and_go_back() -> None:
    one = with_setting(with_setting(SamplingSettings(), "temperature", ["0.6"]), "TOP-P", ["0.9"])
    assert (one.temperature, one.top_p) == (0.6, 0.9)
    assert with_setting(one, "temperature", ["default"]).temperature is None
    assert ("seed", "default") in setting_rows(one)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "warm"),
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("top_p", "0"),
        ("top_p", "1.1"),
        ("max_tokens", "0"),
        ("max_tokens", "1.5"),
        ("colour", "red"),
        ("top_k", "-1"),
        ("top_k", "few"),
        ("stop", ""),
    ],
)
def test_a_wrong_setting_says_how(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_setting(SamplingSettings(), name, [value])
    assert caught.value.fix.startswith("/set ")
