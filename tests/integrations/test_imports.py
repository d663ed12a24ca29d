"""``import conmoe_edge`` is cheap, and its order with transformers does not matter. Each case in a
fresh interpreter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import tiny_model
from tests.hand_packages import thirds, write_package
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_import_is_cheap() -> None:
    code = (
        "import time, sys, json; start = time.process_time()\n"
        "import conmoe_edge; took = time.process_time() - start\n"
        "names = ('torch', 'transformers', 'rich', 'numpy', 'pydantic')\n"
        "heavy = [m for m in names if m in sys.modules]\n"
        "print(json.dumps([took, heavy, conmoe_edge.__version__]))"
    )
    took, heavy, version = min((json.loads(_run(code)) for _ in range(3)), key=lambda one: one[0])
    assert heavy == []
    assert took < 0.3
    assert version.count(".") == 2


def test_plan_is_the_function_whatever_was_imported_before() -> None:
    code = (
        "import conmoe_edge.plan.planner, conmoe_edge as c\n"
        "print(callable(c.plan), callable(c.load), callable(c.fit))\n"
        "from conmoe_edge import plan\n"
        "print(plan.__name__, issubclass(c.PackageError, c.ConmoeError))"
    )
    assert _run(code).split() == ["True", "True", "True", "plan", "True"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = tiny_model("olmoe")
    return write_package(plain, tmp_path_factory.mktemp("package"), thirds(plain))


_USE = (
    "import torch; m = AutoModelForCausalLM.from_pretrained({folder!r}); "
    "print(m.generate(torch.arange(5, 12)[None], max_new_tokens=6, do_sample=False)[0].tolist())"
)


def test_transformers_opens_a_package_in_either_order(folder: Path) -> None:
    use = _USE.format(folder=str(folder))
    outputs = {
        _run(f"import conmoe_edge; from transformers import AutoModelForCausalLM; {use}"),
        _run(f"from transformers import AutoModelForCausalLM; import conmoe_edge; {use}"),
        _run(
            "import conmoe_edge, transformers.modeling_utils; "
            f"from transformers import AutoModelForCausalLM; {use}"
        ),
    }
    assert len(outputs) == 1
    tokens = json.loads(outputs.pop())
    assert len(tokens) == 13


@pytest.mark.parametrize(
    "imports",
    [
        "import conmoe_edge; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig; import conmoe_edge, transformers.generation.utils; "
        "from transformers import AutoModelForCausalLM",
        "import conmoe_edge.model.deepseek_modeling; "
        "from transformers import AutoConfig, AutoModelForCausalLM",
    ],
)
def test_deepseek_is_known_in_either_order(imports: str) -> None:
    code = (
        f"{imports}\n"
        "c = AutoConfig.for_model('deepseek', num_hidden_layers=2, hidden_size=32, vocab_size=64,\n"
        "    intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4,\n"
        "    num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=4,\n"
        "    bos_token_id=1, eos_token_id=2)\n"
        "print(type(AutoModelForCausalLM.from_config(c)).__name__)"
    )
    assert _run(code).strip() == "DeepseekForCausalLM"


@pytest.mark.parametrize(
    "module",
    ["transformers.generation.utils", "transformers.models.olmoe.modeling_olmoe"],
)
def test_any_door_into_transformers_works(module: str) -> None:
    code = (
        f"import conmoe_edge, {module}, transformers.quantizers.auto as q; "
        "print('conmoe' in q.AUTO_QUANTIZER_MAPPING)"
    )
    assert _run(code).strip() == "True"
