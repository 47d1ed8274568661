"""Free memory, from made-up files of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

import fakecupy
from refllm.checkpoints import free_memory as module
from refllm.checkpoints.free_memory import free_memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:   8000000 kB\n"
GB = 10**9


def write(root: Path, **files: str) -> Path:
    """Files under ``root``; "__" in a name stands for "/"."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cgroup2(root: Path, group: str, limit: str, usage: int, cache: int) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cache}\nactive_file 5\n")


def test_without_control_groups_it_is_what_the_kernel_calls_available(tmp_path):
    write(tmp_path, proc__meminfo=MEMINFO)
    assert free_memory(root=tmp_path) == 8_000_000 * 1024


@pytest.mark.parametrize("path", ["/", "/a/b", "/a/b/c", "/of-the-host"])
def test_the_tightest_group_on_the_way_to_the_root_counts(tmp_path, path):
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=f"0::{path}\n")
    cgroup2(tmp_path, "", "max", 9 * GB, 0)
    cgroup2(tmp_path, "a", str(4 * GB), 3 * GB, GB // 2)
    cgroup2(tmp_path, "a/b", str(5 * GB), GB, 0)
    inside = path.startswith("/a")
    assert free_memory(root=tmp_path) == (3 * GB // 2 if inside else 8_000_000 * 1024)


def test_a_container_sees_its_own_group_at_the_top(tmp_path):
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    cgroup2(tmp_path, "", str(2 * GB), GB, 10)
    assert free_memory(root=tmp_path) == GB + 10


def test_a_group_above_its_limit_leaves_nothing(tmp_path):
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    cgroup2(tmp_path, "", str(GB), 2 * GB, 0)
    assert free_memory(root=tmp_path) == 0


def test_version_1_counts_the_children_of_a_group_too(tmp_path):
    top = "sys__fs__cgroup__memory__docker__"
    write(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__cgroup="9:cpu,cpuacct:/other\n4:memory:/docker\n",
        **{
            top + "memory.limit_in_bytes": f"{3 * GB}\n",
            top + "memory.usage_in_bytes": f"{2 * GB}\n",
            top + "memory.stat": f"inactive_file 1\ntotal_inactive_file {GB // 4}\n",
        },
    )
    assert free_memory(root=tmp_path) == 5 * GB // 4


def test_this_machine_answers_and_systems_without_proc_do_too(tmp_path):
    here = free_memory()
    assert here is not None
    assert 0 <= here < 1 << 50
    everything = free_memory(root=tmp_path)  # no files: all memory of the machine
    assert everything is not None
    assert everything >= here


def test_a_silent_system_is_unknown(tmp_path, monkeypatch):
    monkeypatch.delattr(module.os, "sysconf")
    assert free_memory(root=tmp_path) is None
    monkeypatch.setattr(module.sys, "platform", "win32")  # whose library is not here
    assert free_memory(root=tmp_path) is None


def test_a_device_without_a_driver_is_unknown():
    assert free_memory(fakecupy) is None
