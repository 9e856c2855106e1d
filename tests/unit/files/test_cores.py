"""How many cores a process may use: those of its affinity, and of its container's quota."""

import os

import pytest

from megatron_lpr.files import cores


@pytest.fixture
def quota(tmp_path, monkeypatch):
    """`quota(groups, **files)` lays out the control groups of a process that may run on 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cores, "_PROCESS_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "_MOUNTED", tmp_path / "mounted")

    def lay(groups: str, files: dict[str, str]) -> int:
        (tmp_path / "groups").write_text(groups)
        for name, text in files.items():
            (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "mounted" / name).write_text(text)
        return cores.usable_cores()

    return lay


CPU_MAX, QUOTA, PERIOD = "cpu.max", "cpu/{}cpu.cfs_quota_us", "cpu/{}cpu.cfs_period_us"
V1 = "11:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "found"),
    [
        ("0::/\n", {CPU_MAX: "400000 100000\n"}, 4),
        ("0::/\n", {CPU_MAX: "max 100000\n"}, 64),
        ("0::/\n", {CPU_MAX: "250000 100000\n"}, 3),  # Kubernetes gives parts of a core
        ("0::/\n", {CPU_MAX: "10000 100000\n"}, 1),
        ("0::/\n", {CPU_MAX: "12800000 100000\n"}, 64),
        ("0::/\n", {}, 64),
        ("0::/a/b.scope\n", {"a/cpu.max": "800000 100000\n", "a/b.scope/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b.scope\n", {"a/cpu.max": "800000 100000\n", "a/b.scope/cpu.max": "200000 100000\n"}, 2),
        (V1, {QUOTA.format(""): "600000\n", PERIOD.format(""): "100000\n"}, 6),
        (V1, {QUOTA.format(""): "-1\n", PERIOD.format(""): "100000\n"}, 64),
        (V1, {QUOTA.format("docker/1f/"): "50000\n", PERIOD.format("docker/1f/"): "10000\n"}, 5),
    ],
)
def test_a_containers_quota_is_kept_to(quota, groups, files, found):
    assert quota(groups, files) == found


def test_without_control_groups_it_is_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5})
    monkeypatch.setattr(cores, "_PROCESS_GROUPS", tmp_path / "none")
    assert cores.usable_cores() == 3
