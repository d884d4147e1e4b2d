"""The memory that is free, of made-up machines.

| test                                | proves                                           | judged against        |
| test_the_smallest_limit_counts      | both kinds of control groups, those above, files | by hand               |
| test_without_limits_...             | no limit, no control group, no /proc             | by hand               |
| test_this_machine_has_some_memory   | the names of files and keys                      | this machine's kernel |
"""
import pytest

from mindrlhf.free_memory import free_memory

NO_LIMIT = "9223372036854771712\n"


def machine(root, files):
    for name, text in {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  500 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(("files", "expected"), [
    ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.max": "max\n",
      "sys/fs/cgroup/job/step/memory.current": "1000\n", "sys/fs/cgroup/job/memory.max": "300000\n",
      "sys/fs/cgroup/job/memory.current": "100000\n",
      "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 40000\n"}, 240000),
    ({"proc/self/cgroup": "0::/../../job\n", "sys/fs/cgroup/memory.max": "200000\n",
      "sys/fs/cgroup/memory.current": "250000\n"}, 0),
    ({"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "400000\n",
      "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "100000\n",
      "sys/fs/cgroup/memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 50000\n"}, 350000),
])
def test_the_smallest_limit_counts(tmp_path, files, expected):
    assert free_memory(machine(tmp_path, files)) == expected


@pytest.mark.parametrize("files", [{}, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.stat": "anon 1\n"},
                                   {"proc/self/cgroup": "4:memory:/\n",
                                    "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
                                    "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n"}])
def test_without_limits_the_machines_memory_counts(tmp_path, files):
    assert free_memory(machine(tmp_path, files)) == 500 * 1024
    (tmp_path / "proc" / "meminfo").unlink()
    assert free_memory(tmp_path) is None


def test_this_machine_has_some_memory():
    assert free_memory() > 1 << 20
