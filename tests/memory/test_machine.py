"""This machine as it is, and a driver that answers from a script."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from conmoe_edge.memory.machine import _gpu_facts, disk_free, measure_machine
from conmoe_edge.units import GIB, MIB


def test_this_machine(tmp_path):
    facts = measure_machine(tmp_path)
    assert facts.ram_total == psutil.virtual_memory().total
    assert 0 < facts.ram_usable <= facts.ram_available <= facts.ram_total
    assert facts.ram_usable <= facts.ram_limit <= facts.ram_total
    assert facts.physical_cores >= 1
    assert 0 < facts.disk_free <= shutil.disk_usage(tmp_path).total
    assert (facts.gpu is None) == bool(facts.gpu_problem)


def test_the_tightest_limit_counts():
    facts = replace(measure_machine(), ram_total=16 * GIB, ram_available=8 * GIB)
    assert replace(facts, cgroup_limit=None, cgroup_available=None).ram_usable == 8 * GIB
    bound = replace(facts, cgroup_limit=4 * GIB, cgroup_available=3 * GIB)
    assert (bound.ram_usable, bound.ram_limit) == (3 * GIB, 4 * GIB)
    wide = replace(facts, cgroup_limit=99 * GIB, cgroup_available=98 * GIB)
    assert (wide.ram_usable, wide.ram_limit) == (8 * GIB, 16 * GIB)


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert abs(disk_free(tmp_path / "a" / "b") - shutil.disk_usage(tmp_path).free) < GIB


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_looked_for(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    facts = measure_machine()
    assert facts.gpu is None and "CUDA_VISIBLE_DEVICES" in facts.gpu_problem


class _Driver:
    """Answers like NVML for one RTX 4090; ``silent`` calls raise, as unsupported ones do."""

    NVML_CLOCK_MEM = 2

    class NVMLError(Exception):
        """The driver cannot say."""

    def __init__(self, silent: tuple[str, ...] = ()):
        self.silent = silent
        own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=500 * MIB)
        other = SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=None)
        self.answers = {
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24564 * MIB, free=23000 * MIB),
            "nvmlDeviceGetName": b"NVIDIA GeForce RTX 4090",
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlDeviceGetComputeRunningProcesses": [own, other],
            "nvmlDeviceGetMaxClockInfo": 10501,
            "nvmlDeviceGetMemoryBusWidth": 384,
            "nvmlDeviceGetMaxPcieLinkGeneration": 4,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
        }

    def __getattr__(self, name):
        def call(*_):
            if name in self.silent:
                raise self.NVMLError
            return self.answers[name]

        return call


def test_a_gpu_as_the_driver_describes_it():
    gpu = _gpu_facts(_Driver(), object())
    assert gpu.name == "NVIDIA GeForce RTX 4090" and gpu.driver == "580.1"
    assert gpu.used_by_others == (24564 - 23000 - 500) * MIB
    assert gpu.memory_bandwidth == pytest.approx(1008e9, rel=0.001)
    assert gpu.link_bandwidth == pytest.approx(26.8e9, rel=0.01)


def test_a_gpu_that_says_little():
    silent = (
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetMaxClockInfo",
        "nvmlDeviceGetMaxPcieLinkWidth",
    )
    gpu = _gpu_facts(_Driver(silent), object())
    assert gpu.used_by_others == (24564 - 23000) * MIB
    assert gpu.memory_bandwidth is None and gpu.link_bandwidth is None
