"""What the tool prints of the installed transformers."""

from __future__ import annotations

import pytest

from conmoe_edge.offload.fastpath import single_step
from conmoe_edge.offload.fastpath.single_step import installed_forwards
from tools.fastpath_digests import lines


@pytest.fixture(scope="module")
def forwards() -> dict[str, tuple[str | None, bool]]:
    return installed_forwards()


@pytest.mark.parametrize(
    ("decoder", "head"),
    [
        ("olmoe.OlmoeModel", "olmoe.OlmoeForCausalLM"),
        ("qwen3_moe.Qwen3MoeModel", "qwen3_moe.Qwen3MoeForCausalLM"),
        ("gpt_oss.GptOssModel", "gpt_oss.GptOssForCausalLM"),
        ("mixtral.MixtralModel", "mixtral.MixtralForCausalLM"),
    ],
)
def test_models_that_are_stepped_alone_are_known(
    forwards: dict[str, tuple[str | None, bool]], decoder: str, head: str
) -> None:
    assert forwards[decoder][1] and forwards[head][1]
    assert forwards[decoder][0] in single_step._DECODERS
    assert forwards[head][0] in single_step._HEADS


def test_a_decoder_with_steps_of_its_own_is_named(
    forwards: dict[str, tuple[str | None, bool]],
) -> None:
    digest, known = forwards["qwen3_next.Qwen3NextModel"]  # layers with two kinds of masks
    assert digest and not known
    (line,) = (one for one in lines(forwards) if one.startswith("qwen3_next.Qwen3NextModel "))
    assert line.endswith(f"{digest}  NOT ON THE LIST")


def test_a_changed_forward_is_no_longer_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeModel

    def forward(self: OlmoeModel, input_ids: object = None) -> object:
        return input_ids

    monkeypatch.setattr(OlmoeModel, "forward", forward)
    found = installed_forwards()
    assert not found["olmoe.OlmoeModel"][1]
    assert found[f"olmoe.{OlmoeForCausalLM.__name__}"][1]
