"""Free memory of the host, for this process and those that it starts."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# By the controllers that a line of CGROUP names, none in version 2: where its groups are, the files of their
# limit and usage, and the entries of memory.stat for the file cache.
VERSIONS = {
    "": (CGROUPS, "memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        CGROUPS / "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def free_host_bytes() -> int:
    """What the kernel calls available, in bytes, and no more than each memory limit of this process's control
    groups leaves.

    The file cache counts as free in both, since it gives way.
    """
    return max(min([psutil.virtual_memory().available, *_left_in_groups()]), 0)


def _left_in_groups() -> Iterator[int]:
    try:
        lines = CGROUP.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in VERSIONS:
            continue
        root, limit, usage, cache = VERSIONS[controllers]
        own = PurePosixPath(path.lstrip("/"))
        # A container may see its own group as the root, whatever its path is called.
        for group in (own, *own.parents):
            try:
                stat = dict(map(str.split, Path(root, group, "memory.stat").read_text().splitlines()))
                used = int(Path(root, group, usage).read_text()) - sum(int(stat[name]) for name in cache)
                yield int(Path(root, group, limit).read_text()) - used
            except (OSError, KeyError, ValueError):  # no such group, or "max": no limit
                continue
