"""From the user's word to a budget."""

from __future__ import annotations

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.machine import GpuFacts, MachineFacts
from conmoe_edge.memory.resolve import resolve_budget
from conmoe_edge.units import GIB, MIB

_LAPTOP = MachineFacts(
    ram_total=16 * GIB,
    ram_available=10 * GIB,
    cgroup_limit=None,
    cgroup_available=None,
    physical_cores=4,
    gpu=None,
    gpu_problem="no NVIDIA driver answers",
    disk_free=100 * GIB,
)
_CARD = GpuFacts("RTX 4060", 8188 * MIB, 7800 * MIB, 388 * MIB, "580", 256e9, 13e9)
_WORKSTATION = MachineFacts(
    ram_total=32 * GIB,
    ram_available=20 * GIB,
    cgroup_limit=24 * GIB,
    cgroup_available=18 * GIB,
    physical_cores=8,
    gpu=_CARD,
    gpu_problem="",
    disk_free=100 * GIB,
)


@pytest.fixture(autouse=True)
def no_user_profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("512MiB", 512 * MIB)],
)
def test_sizes_are_exact(asked, expected):
    for facts in (_LAPTOP, _WORKSTATION):
        budget = resolve_budget(asked, facts=facts)
        assert budget.device_bytes == expected and budget.asked == asked


def test_a_size_without_a_gpu_means_ram():
    budget = resolve_budget("8GB", facts=_LAPTOP)
    assert budget.device == "cpu" and budget.host_bytes == 0
    assert budget.source == "you asked for 8GB = 7.45 GiB of RAM"


def test_more_ram_than_there_is_gets_said():
    assert "only 16.00 GiB" in resolve_budget("17GiB", facts=_LAPTOP).here
    assert "only 10.00 GiB" in resolve_budget("12GiB", facts=_LAPTOP).here
    assert "only 24.00 GiB" in resolve_budget("30GiB", "cpu", facts=_WORKSTATION).here


def test_a_size_with_a_gpu_takes_its_bandwidths():
    budget = resolve_budget("4GB", facts=_WORKSTATION)
    assert budget.device == "cuda" and budget.host_bytes == 18 * GIB
    assert (budget.device_bandwidth, budget.link_bandwidth) == (256e9, 13e9)
    assert "8.00 GiB, 388.0 MiB in use by others" in budget.here
    assert "less than you asked for" in resolve_budget("24GB", facts=_WORKSTATION).here
    assert "not all of it is free" in resolve_budget("8188MiB", facts=_WORKSTATION).here


def test_a_gpu_target_may_be_another_machine():
    budget = resolve_budget("8GB", "cuda", facts=_LAPTOP)
    assert budget.device == "cuda" and budget.host_bytes is None
    assert "another one" in budget.here


def test_auto_takes_what_is_free_less_a_share():
    budget = resolve_budget("auto", facts=_LAPTOP)
    assert budget.device == "cpu" and budget.device_bytes == 9 * GIB
    assert budget.in_use_by_others == 6 * GIB
    bound = resolve_budget("AUTO", "cpu", facts=_WORKSTATION)
    assert bound.device_bytes == int(18 * GIB * 0.9)
    assert "limit of 24.00 GiB" in bound.source
    gpu = resolve_budget("auto", facts=_WORKSTATION)
    assert gpu.device == "cuda" and gpu.device_bytes == (7800 - 256) * MIB
    assert gpu.in_use_by_others == 388 * MIB


def test_auto_without_the_device_that_was_asked_for():
    with pytest.raises(UsageError) as caught:
        resolve_budget("auto", "cuda", facts=_LAPTOP)
    assert caught.value.why == "no NVIDIA driver answers" and "--device cpu" in caught.value.fix


def test_profiles_need_no_look_at_this_machine():
    budget = resolve_budget("rtx-4090")
    assert budget.device == "cuda" and budget.device_bytes == (24564 - 512) * MIB
    assert (budget.link_bandwidth, budget.disk_bandwidth) == (25.6e9, 5.9e9)
    cpu = resolve_budget("cpu-16gb")
    assert cpu.device == "cpu" and cpu.device_bytes == 12 * GIB and cpu.host_bytes == 0
    assert cpu.link_bandwidth == cpu.disk_bandwidth == 2e9


def test_this_very_machine():
    assert resolve_budget("auto", "cpu").device_bytes > 0
    assert resolve_budget("1GB", "cpu").device_bytes == 10**9


@pytest.mark.parametrize("asked", ["8", "7.5", " 24 "])
def test_a_number_needs_a_unit(asked):
    with pytest.raises(UsageError) as caught:
        resolve_budget(asked, facts=_LAPTOP)
    number = asked.strip()
    assert caught.value.fix == f"--gpu {number}GB (decimal) or --gpu {number}GiB (binary)"


@pytest.mark.parametrize("asked", ["0GB", "", "-8GB", "8 pounds", "1e3GB", "rtx"])
def test_what_is_neither_size_nor_profile(asked):
    with pytest.raises(UsageError) as caught:
        resolve_budget(asked, facts=_LAPTOP)
    assert "--gpu" in caught.value.fix


def test_profile_and_device_may_not_contradict():
    with pytest.raises(UsageError, match="contradict"):
        resolve_budget("rtx-4090", "cpu")
    assert resolve_budget("rtx-4090", "cuda").device == "cuda"


@pytest.mark.parametrize("asked", ["8GB", "40GB"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_measurements_a_size_means_the_same_everywhere(asked, device):
    class Meter:
        def __init__(self, rate):
            self.memory = self.disk = lambda: rate

    budgets = [
        resolve_budget(asked, device, facts=facts, meter=Meter(rate))
        for facts, rate in ((_LAPTOP, 1e9), (_WORKSTATION, 5e9), (_WORKSTATION, None))
    ]
    assert len({budget.without_measurements() for budget in budgets}) == 1
    assert len(set(budgets)) > 1


def test_a_profile_measures_nothing():
    budget = resolve_budget("rtx-4090")
    assert not budget.measured and budget.without_measurements() is budget
