"""One layer on a device against the processor. There is no such device here, so the processor stands in for it: against
itself, and against itself with something wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conmoe_edge.errors import UsageError
from conmoe_edge.integrations import device_check
from conmoe_edge.integrations.load import load_package
from conmoe_edge.offload.compute.torch_backend import Arithmetic
from tests.families import tiny_model
from tests.hand_packages import identity, thirds, write_package


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe")
    return write_package(plain, tmp_path_factory.mktemp("package"), identity(plain))


@pytest.fixture(autouse=True)
def processor_in_place(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every load is one on an experimental device; which it was."""
    seen: list[str] = []

    def word(device: torch.device) -> str:
        seen.append(str(device))
        return "mps"

    monkeypatch.setattr(device_check, "experimental", word)
    return seen


@pytest.mark.parametrize("kind", ["plain", "int8"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2", "qwen3_next"])
def test_the_processor_agrees_with_itself(
    family: str,
    kind: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processor_in_place: list[str],
) -> None:
    """Whatever form the weights have, also where the operator rounds activations on the one side; and the model is the
    same afterwards.
    """
    plain = tiny_model(family, dtype=torch.bfloat16)
    dense = [name + ".weight" for name, one in plain.named_modules() if name.endswith("o_proj")]
    folder = write_package(plain, tmp_path, thirds(plain), kind=kind, in_int8=dense)
    model: Any = load_package(folder)
    assert processor_in_place == ["cpu"]
    ids = torch.tensor([[5, 17, 33, 80, 12]])
    with torch.no_grad():
        found = model(ids).logits
    monkeypatch.setattr(device_check, "experimental", lambda device: None)
    other: Any = load_package(folder)
    with torch.no_grad():
        assert torch.equal(found, other(ids).logits)


def _refused(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_package(folder)
    assert caught.value.what.startswith("Apple GPU (Metal) does not compute layer")
    assert "--device cpu" in caught.value.fix
    return caught.value


def test_a_wrong_dense_matrix_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_package(whole)
    right = device_check.copy_on_cpu

    def other(*given: Any) -> Any:
        layer = right(*given)
        linear = next(one for one in layer.modules() if isinstance(one, torch.nn.Linear))
        with torch.inference_mode():
            linear.weight.data = linear.weight.data.roll(1, 0)
        return layer

    monkeypatch.setattr(device_check, "copy_on_cpu", other)
    assert "rows differ" in _refused(whole).why


@pytest.mark.parametrize("many", [True, False])
def test_wrong_experts_are_refused(
    whole: Path, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """In prompts, and in single tokens alone."""
    name = "add_all" if many else "one_token"
    right = getattr(Arithmetic, name)

    def doubled(self: Arithmetic, *given: Any) -> Any:
        out = right(self, *given)
        if type(self) is Arithmetic:
            given[-1].mul_(2.0) if many else out.mul_(2.0)
        return out

    monkeypatch.setattr(Arithmetic, name, doubled)
    rows = Arithmetic.rows
    if not many:  # where one token goes by rows
        monkeypatch.setattr(
            Arithmetic,
            "rows",
            lambda self, *given: (
                rows(self, *given)
                * (2.0 if type(self) is Arithmetic and len(given[-1]) == 1 else 1.0)
            ),
        )
    assert ("rows differ" if many else "single tokens differ") in _refused(whole).why


def test_numbers_that_are_none_and_operations_that_are_not_there(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Arithmetic.add_all

    def none(self: Arithmetic, *given: Any) -> None:
        right(self, *given)
        if type(self) is Arithmetic:
            given[-1][0] = float("nan")

    monkeypatch.setattr(Arithmetic, "add_all", none)
    assert "numbers that are none" in _refused(whole).why

    def absent(self: Arithmetic, *given: Any) -> None:
        raise NotImplementedError("The operator 'aten::some' is not implemented for the MPS device")

    monkeypatch.setattr(Arithmetic, "add_all", absent)
    assert "aten::some" in _refused(whole).why
