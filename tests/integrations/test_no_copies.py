"""A loaded package says why it is not copied or pickled."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.integrations.load import load_package
from tests.families import tiny_model
from tests.hand_packages import thirds, write_package


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_names_the_way(make: Any, tmp_path: Path) -> None:
    plain = tiny_model("olmoe")
    model = load_package(write_package(plain, tmp_path / "package", thirds(plain)))
    with pytest.raises(UsageError, match="cannot be copied or pickled") as refused:
        make(model)
    assert "conmoe_edge.load(" in refused.value.fix
    assert copy.deepcopy(model.config) is not None
