"""The shipped profiles, the user's own, and mistakes in them."""

from __future__ import annotations

import pytest

from conmoe_edge.errors import UsageError
from conmoe_edge.memory.profiles import get_profile, list_profiles, shipped_folder, user_folder
from conmoe_edge.units import GIB, MIB


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The user's profile folder, empty."""
    monkeypatch.setenv("CONMOE_CONFIG_DIR", str(tmp_path))
    folder = tmp_path / "profiles"
    folder.mkdir()
    return folder


def test_every_shipped_profile_loads_and_is_plausible():
    profiles = {profile.name: profile for profile in list_profiles()}
    assert set(profiles) >= {
        "rtx-4090",
        "rtx-3090",
        "rtx-3060-12gb",
        "rtx-4060-laptop-8gb",
        "a100-80gb",
        "h200",
        "cpu-16gb",
        "cpu-32gb",
    }
    assert len(profiles) == len(list(shipped_folder().glob("*.toml")))
    assert list(profiles) == sorted(profiles)
    for profile in profiles.values():
        assert 4 * GIB < profile.usable < profile.memory < 200 * GIB
        assert profile.title and profile.source and profile.origin == "shipped"
        assert profile.memory_bandwidth is not None and profile.disk_bandwidth is not None
        assert 20e9 < profile.memory_bandwidth < 10e12
        assert 1e9 < profile.disk_bandwidth < 20e9
        assert (profile.link_bandwidth is None) == (profile.device == "cpu")
        if profile.link_bandwidth is not None:
            assert profile.disk_bandwidth < profile.link_bandwidth < profile.memory_bandwidth


def test_figures_of_a_4090():
    profile = get_profile("RTX-4090")
    assert profile.memory == 24564 * MIB
    assert profile.usable == 24564 * MIB - 512 * MIB
    assert profile.memory_bandwidth == 1008e9
    assert profile.link_bandwidth == 25.6e9


@pytest.mark.parametrize("asked", ["rtx4090", "rtx-4080", "rtx-40900"])
def test_an_unknown_name_gets_the_nearest(asked):
    with pytest.raises(UsageError) as caught:
        get_profile(asked)
    assert asked in caught.value.what
    assert caught.value.fix == "--gpu rtx-4090"


def test_a_hopeless_name_gets_the_list():
    with pytest.raises(UsageError) as caught:
        get_profile("zzzzzzzz")
    assert "cpu-16gb" in caught.value.why


def test_a_user_profile_adds_and_replaces(own_folder):
    (own_folder / "my-box.toml").write_text('device = "cpu"\nmemory = "7.5GiB"\nreserve = "1GiB"\n')
    (own_folder / "rtx-4090.toml").write_text('device = "cuda"\nmemory = 20000\n')
    names = [profile.name for profile in list_profiles()]
    assert names == sorted(names) and names.count("rtx-4090") == 1
    mine = get_profile("my-box")
    assert mine.usable == 6.5 * GIB and mine.device == "cpu"
    assert mine.title == "my-box" and mine.origin == str(own_folder / "my-box.toml")
    replaced = get_profile("rtx-4090")
    assert replaced.memory == 20000 * MIB and replaced.memory_bandwidth is None


def test_a_profile_from_an_editor_that_puts_a_mark_in_front(own_folder):
    (own_folder / "my-box.toml").write_text('device = "cpu"\nmemory = "2GiB"\n', "utf-8-sig")
    assert get_profile("my-box").memory == 2 * GIB


def test_a_base_is_overlaid(own_folder):
    (own_folder / "eight-lanes.toml").write_text(
        'base = "rtx-4090"\nlink_bandwidth = "13GB/s"\nhost_memory = "64GiB"\n'
    )
    profile = get_profile("eight-lanes")
    assert profile.link_bandwidth == 13e9 and profile.host_memory == 64 * GIB
    assert profile.memory == get_profile("rtx-4090").memory


@pytest.mark.parametrize(
    ("text", "key", "fix"),
    [
        ('device = "cpu"', "memory", "memory ="),
        ('memory = "8GB"', "device", "device ="),
        ('device = "tpu"\nmemory = "8GB"', "device", '"cpu" or "cuda"'),
        ('device = "cpu"\nmemory = "8"', "memory", "12GiB"),
        ('device = "cpu"\nmemory = 8.5', "memory", "12GiB"),
        ('device = "cpu"\nmemory = true', "memory", "12GiB"),
        ('device = "cpu"\nmemory = 0', "memory", "12GiB"),
        ('device = "cpu"\nmemory = -5', "memory", "12GiB"),
        ('device = "cpu"\nmemory = "8GB"\nreserve = "9GB"', "reserve", "smaller"),
        ('device = "cpu"\nmemory = "8GB"\ndisk_bandwidth = 3', "disk_bandwidth", "3GB/s"),
        ('device = "cpu"\nmemory = "8GB"\ndisk_bandwidth = "3GB"', "disk_bandwidth", "GB/s"),
        (
            'device = "cpu"\nmemory = "8GB"\ndisk_bandwith = "3GB/s"',
            "disk_bandwith",
            "disk_bandwidth",
        ),
        ('device = "cpu"\nmemory = "8GB"\nname = "x"', "name", "keys are"),
        ('base = "rtx-1"', "base", "rtx-4090"),
        ('base = "../rtx-4090"', "base", "rtx-4090"),
        ("device = ", "the text", "key = value"),
    ],
)
def test_a_mistake_names_file_key_and_fix(own_folder, text, key, fix):
    path = own_folder / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        get_profile("mine")
    error = caught.value
    assert str(path) in error.what and error.what.endswith(f"{key}.")
    assert fix in error.fix
    assert "\n" not in error.what + error.why + error.fix
    assert get_profile("rtx-4090").device == "cuda"  # the others still work


@pytest.mark.parametrize("name", ["8gb", "auto", "with space"])
def test_names_that_read_as_something_else_are_refused(own_folder, name):
    (own_folder / f"{name}.toml").write_text('device = "cpu"\nmemory = "8GB"\n')
    with pytest.raises(UsageError, match="file name"):
        list_profiles()


def test_bytes_that_are_no_text(own_folder):
    (own_folder / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"mine\.toml"):
        get_profile("mine")


def test_user_folder_follows_the_variable(own_folder, monkeypatch):
    assert user_folder() == own_folder
    monkeypatch.delenv("CONMOE_CONFIG_DIR")
    assert user_folder().name == "profiles" and "conmoe-edge" in str(user_folder())
