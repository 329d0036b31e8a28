"""What this run runs on: the facts that make two results comparable, and the sizes that keep operands cold."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import cpuinfo
import psutil
import threadpoolctl
import torch

import moekern

_MB = 1 << 20
_SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _sysfs(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def l3_bytes() -> int:
    """All last-level caches together; 64 MB where the system does not say.

    From sysfs: what lscpu and py-cpuinfo print as L3 is, on some CPUs, the L2 of one core.
    """
    caches: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        size = _sysfs(index / "size")
        if _sysfs(index / "level") == "3" and size:
            factor = _SUFFIX.get(size[-1])
            caches[_sysfs(index / "shared_cpu_list")] = int(size[:-1]) * factor if factor else int(size)
    return sum(caches.values()) or 64 * _MB


def cold_bytes() -> int:
    """How much other memory must be touched before an operand is used again, for it to come from DRAM."""
    return max(4 * l3_bytes(), 256 * _MB)


def memory_budget() -> int:
    """What this run may allocate: half of what is free."""
    return psutil.virtual_memory().available // 2


def _commit() -> str:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def describe() -> dict[str, Any]:
    """The machine. Results are comparable where `identity` is equal."""
    cpu = moekern.devices()[0]
    info = cpuinfo.get_cpu_info()
    return {
        "identity": {
            "cpu": info.get("brand_raw") or cpu.name,
            "family_model": f"{info.get('family', '?')}/{info.get('model', '?')}",
            "arch": cpu.arch,
            "features": sorted(cpu.features),
            "cores": psutil.cpu_count(logical=False),
            "threads": torch.get_num_threads(),
            "l3_mb": l3_bytes() // _MB,
        },
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "hugepages": _sysfs(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moekern": f"{moekern.__version__} ({_commit()})",
        "thread_pools": [
            {"library": pool["prefix"], "threads": pool["num_threads"]} for pool in threadpoolctl.threadpool_info()
        ],
    }


def headline(machine: dict[str, Any]) -> str:
    i = machine["identity"]
    return (
        f"{i['cpu']} ({i['family_model']}), {i['threads']} threads on {i['cores']} cores, L3 {i['l3_mb']} MB · "
        f"torch {machine['torch']} · moekern {machine['moekern']}"
    )
