"""What `python -m moekern info` reports. Every probe is guarded: a broken part is a line of the report.

Only the standard library is imported at the top, so that the report prints when torch is broken or
_C is missing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

_VARIABLES = re.compile(
    r"MOEKERN_|OMP_|GOMP_|KMP_|MKL_NUM_THREADS$|LD_PRELOAD$|CUDA_VISIBLE_DEVICES$|(HIP|ROCR)_VISIBLE_DEVICES$|"
    r"ASCEND_RT_VISIBLE_DEVICES$|TORCH_DEVICE_BACKEND_AUTOLOAD$"
)
_OPENMP = re.compile(r"/lib(gomp|omp|iomp5)[^/]*\.so[^/]*$")


def import_error() -> str | None:
    """Why `import moekern` fails, if it does."""
    import moekern

    error = moekern._import_error
    return None if error is None else f"{type(error).__name__}: {error}"


def collect() -> dict[str, Any]:
    """The report as data. A probe that fails leaves {"error": reason} in its place."""
    return {name: _guarded(probe) for name, probe in _PROBES.items()}


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:  # a half-installed package or driver may raise anything at all
        return {"error": f"{type(error).__name__}: {error}"}


def _moekern() -> dict[str, Any]:
    import moekern

    return {
        "version": moekern.__version__,
        "location": os.path.dirname(moekern.__file__),
        "import_error": import_error(),
    }


def _native_module() -> dict[str, Any]:
    from moekern import _C

    connected = import_error() is None  # only then is it known how tensors will be read
    return {
        "location": _C.__file__,
        "compiler": _C.compiler,
        "dlpack_exchange_table": _C.uses_exchange_table() if connected else None,
    }


def _python() -> dict[str, str]:
    return {"version": platform.python_version(), "location": sys.executable}


def _torch() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__, "location": os.path.dirname(torch.__file__)}


def _system() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"platform": platform.platform(), "cpu": _cpu_name(), "cpus": os.cpu_count(), "usable_cpus": usable}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _backends() -> dict[str, Any]:
    from moekern.backends import loaded

    return {
        name: {
            "absent": backend.absent,
            "devices": [
                {"kind": d.kind, "index": d.index, "arch": d.arch, "name": d.name, "features": sorted(d.features)}
                for d in backend.devices
            ],
        }
        for name, backend in loaded.items()
    }


def _kernels() -> dict[str, Any]:
    """Per op, best first: each kernel and why no device here can run it, or None."""
    import moekern
    from moekern.ops import OPS

    devices = moekern.devices()
    return {op.name: [{"name": kernel.name, "why_not": kernel.absent(devices)} for kernel in op.kernels] for op in OPS}


def _threads() -> dict[str, Any]:
    import torch

    from moekern import _C
    from moekern.op import policy

    return {
        "moekern": policy.num_threads or torch.get_num_threads(),
        "torch": torch.get_num_threads(),
        "team": _C.native["cpu"]["thread_team"](),
    }


def _openmp_libraries() -> list[str]:
    """The OpenMP runtimes in this process; with two, each spins while the other works."""
    with open("/proc/self/maps") as lines:
        paths = {line.split(maxsplit=5)[5].strip() for line in lines if line.count("/")}
    return sorted(path for path in paths if _OPENMP.search(path))


def _policy() -> dict[str, Any]:
    from moekern.op import policy

    return {"backend": policy.backend, "kernels": dict(policy.kernels), "batch_invariant": policy.batch_invariant}


def _environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}


_PROBES: dict[str, Callable[[], Any]] = {
    "moekern": _moekern,
    "native_module": _native_module,
    "python": _python,
    "torch": _torch,
    "system": _system,
    "backends": _backends,
    "kernels": _kernels,
    "threads": _threads,
    "openmp_libraries": _openmp_libraries,
    "policy": _policy,
    "environment": _environment,
}


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def as_text(report: dict[str, Any]) -> str:
    lines: list[str] = []
    for name, write in _SECTIONS.items():
        part = report[name]
        if "error" not in part:
            lines += write(part)
        elif part["error"] != report["moekern"].get("import_error"):  # said once, in the second line
            lines.append(f"{name.replace('_', ' ')}: {part['error']}")
    return "\n".join(lines)


def _titled(title: str, lines: list[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)]


def _moekern_text(part: dict[str, Any]) -> list[str]:
    head = f"moekern  {part['version']}  {part['location']}"
    return [head, f"         cannot be imported: {part['import_error']}"] if part["import_error"] else [head]


def _native_module_text(part: dict[str, Any]) -> list[str]:
    lines = [f"         {part['location']} ({part['compiler']})"]
    if part["dlpack_exchange_table"] is not None:
        way = "through torch's DLPack table" if part["dlpack_exchange_table"] else "by attribute (torch < 2.10)"
        lines.append(f"         reads tensors {way}")
    return lines


def _system_text(part: dict[str, Any]) -> list[str]:
    return [f"system   {part['platform']}, {part['cpu']}, {part['usable_cpus']} of {part['cpus']} CPUs"]


def _backends_text(part: dict[str, Any]) -> list[str]:
    lines = []
    for name, backend in part.items():
        if backend["absent"]:
            lines.append(f"{name:<8}absent: {backend['absent']}")
        for d in backend["devices"]:
            lines.append(f"{name:<8}{d['index']}: {d['name']} ({', '.join([d['arch'], *d['features']])})")
    return _titled("Devices", lines) if lines else []


def _kernels_text(part: dict[str, Any]) -> list[str]:
    tables: dict[str, list[str]] = {}  # ops with the same kernels share a table
    for op, kernels in part.items():
        tables.setdefault(json.dumps(kernels), []).append(op)
    lines = []
    for table, ops in tables.items():
        kernels = json.loads(table)
        lines.append(f"{', '.join(ops)}:{'' if kernels else ' none'}")
        lines += [f"  {k['name']:<24}{'no: ' + k['why_not'] if k['why_not'] else 'usable'}" for k in kernels]
    return _titled("Kernels, best first", lines)


def _threads_text(part: dict[str, Any]) -> list[str]:
    return _titled("Threads", [f"{part['moekern']} (torch {part['torch']}), of {part['team']} team"])


def _openmp_libraries_text(part: list[str]) -> list[str]:
    return [f"  OpenMP loaded: {path}" for path in part or ["none"]]


def _policy_text(part: dict[str, Any]) -> list[str]:
    asked = [f"{name}: {value}" for name, value in part.items() if value]
    return _titled("Asked for by moekern.use or the environment", asked) if asked else []


def _environment_text(part: dict[str, str]) -> list[str]:
    return _titled(
        "Environment", [f"{name}={value}" for name, value in part.items()] or ["nothing that matters is set"]
    )


_SECTIONS: dict[str, Callable[[Any], list[str]]] = {
    "moekern": _moekern_text,
    "native_module": _native_module_text,
    "python": lambda part: [f"python   {part['version']}  {part['location']}"],
    "torch": lambda part: [f"torch    {part['version']}  {part['location']}"],
    "system": _system_text,
    "backends": _backends_text,
    "kernels": _kernels_text,
    "threads": _threads_text,
    "openmp_libraries": _openmp_libraries_text,
    "policy": _policy_text,
    "environment": _environment_text,
}
