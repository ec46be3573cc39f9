"""Checks of `doctor`: would a server with these settings run well on this machine?"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from budgetformer.checkpoint.store import Checkpoint, Store, read_store
from budgetformer.cores import cgroups, cpu_quota, usable_cores
from budgetformer.errors import BudgetFormerError, CheckpointError
from service.process import bind, run_folder
from service.settings import Settings
from service.telemetry.traces import check_tracing, exporter_asked_for

LIBRARIES_BYTES, ENGINE_BYTES = 250 * 2**20, 60 * 2**20
"""Measured memory of the server without engines, and of an engine without models."""
SHARED_PER_WEIGHT, ENGINE_PER_WEIGHT = 1.5, 2.5
"""Memory of a model as a multiple of its weight file: shared by all engines, and for each engine.

Upper bounds, measured in bfloat16. They include packed weights, compiled products and activations.
"""
OPEN_FILES = 4096
"""Recommended limit on open files."""


@dataclass(frozen=True)
class Finding:
    """Result of one check, and the change that is advised if it is not ok."""

    check: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str | None = None


def examine(settings: Settings) -> Iterator[Finding]:
    """Yield a finding for each check; a finding `fail` would prevent the server from serving.

    This imports torch, hashes files, and binds the ports for a moment.
    """
    store: Store | None = None
    try:
        store = read_store(settings.model_store)
    except CheckpointError as error:
        yield Finding("store", "fail", str(error), "choose another --model-store")
    yield _device(settings)
    yield _threads(settings)
    yield _dtype(settings)
    if store is not None:
        yield from _store(settings, store)
        yield _memory(settings, store)
    yield _port(settings)
    yield _open_files()
    yield _run_folder()
    yield _traces()


def _device(settings: Settings) -> Finding:
    import torch

    device = settings.resolved_device()
    if device == "cuda" and not torch.cuda.is_available():
        advice = "--device cpu, or install the driver and a CUDA build of torch"
        return Finding("device", "fail", "--device cuda, but torch sees no GPU", advice)
    if device == "cuda":
        found, missing = f"cuda: {torch.cuda.get_device_name()}", _missing_for_triton()
        if missing is None:
            return Finding("device", "ok", found)
        advice = "install gcc and Python's headers (Debian: gcc libc6-dev python3-dev)"
        found = f"{found}, but no {missing}, which Triton needs to launch kernels"
        return Finding("device", "fail", found, advice)
    if shutil.which("nvidia-smi") and settings.device == "auto":
        advice = "install a CUDA build of torch to use the GPU, or pass --device cpu"
        return Finding(
            "device", "warn", "cpu, although there is a GPU, which torch cannot see", advice
        )
    return Finding("device", "ok", f"cpu: {torch.backends.cpu.get_cpu_capability()}")


def _missing_for_triton() -> str | None:
    """Return what is missing for Triton to compile kernel launchers: a C compiler or Python.h."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "C compiler"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if headers.exists() else str(headers)


def _threads(settings: Settings) -> Finding:
    engines, each, cores = settings.resolved_engines(), settings.threads_per_engine, usable_cores()
    quota = cpu_quota()
    limited = "" if quota is None else f" (the CPU quota is {quota:g})"
    found = f"{engines} engines of {each} threads, {cores} usable cores{limited}"
    on_cpu = settings.resolved_device() != "cuda"
    if on_cpu and engines * each > cores:
        advice = f"--engines {max(1, cores // each)}: more threads than cores slow each other down"
        return Finding("threads", "warn", found, advice)
    if quota is not None and engines * each > quota:
        return Finding("threads", "warn", found, "raise the container's CPU limit")
    if on_cpu and engines * each < cores:
        return Finding("threads", "ok", f"{found}; the frontends use the others")
    return Finding("threads", "ok", found)


def _dtype(settings: Settings) -> Finding:
    import torch

    from budgetformer.inference.backends.linear import can_multiply_bfloat16

    if settings.resolved_device() == "cuda":
        has_bfloat16 = not torch.cuda.is_available() or can_multiply_bfloat16(torch.device("cuda"))
        found = f"{settings.dtype}; the GPU {'has' if has_bfloat16 else 'has no'} bfloat16"
        state: Literal["ok", "warn", "fail"] = (
            "ok" if has_bfloat16 or settings.dtype != "bfloat16" else "warn"
        )
        if settings.dtype == "int8":
            state, found = "fail", "int8 is available on CPUs only"
        return Finding("dtype", state, found, None if state == "ok" else "--dtype auto")
    flags = cpu_flags()
    amx, avx2 = "amx_bf16" in flags, "avx2" in flags
    has = f"the processor has {'AMX' if amx else 'AVX2, but no AMX' if avx2 else 'no AVX2'}"
    if settings.dtype == "auto":
        chosen = "bfloat16" if amx else "int8, float32 without ranges of states"
        return Finding("dtype", "ok", f"auto: {chosen if amx or avx2 else 'float32'}; {has}")
    if settings.dtype == "fastest":
        advice = "--dtype auto: after a restart, timing may choose another dtype and change answers"
        return Finding("dtype", "warn", f"fastest; {has}", advice)
    if settings.dtype == "bfloat16" and not amx:
        return Finding("dtype", "warn", f"bfloat16; {has}", "--dtype auto: bfloat16 is slow here")
    if settings.dtype in ("float32", "int8") and amx:
        advice = "--dtype auto: bfloat16 is the fastest here"
        return Finding("dtype", "warn", f"{settings.dtype}; {has}", advice)
    if settings.dtype == "int8" and not avx2:
        return Finding("dtype", "fail", f"int8; {has}", "--dtype auto")
    return Finding("dtype", "ok", f"{settings.dtype}; {has}")


def _store(settings: Settings, store: Store) -> Iterator[Finding]:
    advice = "`budgetformer models add` it again, or remove its folder"
    for problem in store.errors:
        yield Finding("store", "fail", problem, advice)
    try:
        served = served_models(settings, store)
    except CheckpointError as error:
        yield Finding("store", "fail", str(error), "see `budgetformer models list`")
        return
    if not served:
        found = f"{settings.model_store}: no checkpoint"
        yield Finding("store", "fail", found, "`budgetformer models add` one, or --model-store")
    for checkpoint in served:
        try:
            checkpoint.verify()
        except CheckpointError as error:
            yield Finding("store", "fail", str(error), advice)
            continue
        if settings.dtype == "int8" and not checkpoint.manifest.ranges:
            found = f"{checkpoint.label}: no ranges of states, which int8 needs"
            yield Finding("store", "fail", found, "`budgetformer calibrate`, or --dtype auto")
            continue
        found = f"{checkpoint.label}: {len(checkpoint.manifest.files)} files match the manifest"
        if checkpoint.calibrated:
            yield Finding("store", "ok", found)
        else:
            calibrate = "`budgetformer calibrate` gives it quality levels"
            yield Finding("store", "warn", f"{found}, but it has no quality levels", calibrate)


def served_models(settings: Settings, store: Store) -> list[Checkpoint]:
    """Return the checkpoints that a server with these settings loads.

    Raises:
        CheckpointError: a checkpoint that the settings name is not in the store.
    """
    specs = settings.models or sorted(store.checkpoints)
    if settings.default_model is not None:
        store.find(settings.default_model)
    return [store.find(spec) for spec in specs]


def _memory(settings: Settings, store: Store) -> Finding:
    try:
        served = served_models(settings, store)
    except CheckpointError:
        served = []
    weights = sum(e.bytes for c in served for e in c.manifest.files.values())
    shared = LIBRARIES_BYTES + int(SHARED_PER_WEIGHT * weights)
    engine = ENGINE_BYTES + int(ENGINE_PER_WEIGHT * weights)
    total = shared + engine * settings.resolved_engines()
    free = available_memory()
    found = (
        f"about {_mib(shared)} MiB and {_mib(engine)} per engine, {_mib(total)} in all; "
        f"{_mib(free)} free"
    )
    if shared + engine > free:
        return Finding("memory", "fail", found, "serve fewer --models, or add memory")
    if total > free:
        advice = f"--engines {(free - shared) // engine}, or fewer --models"
        return Finding("memory", "warn", found, advice)
    return Finding("memory", "ok", found)


def _port(settings: Settings) -> Finding:
    ports = [settings.port] if settings.grpc_port is None else [settings.port, settings.grpc_port]
    try:
        for port in ports:
            bind(settings.host, port).close()
    except BudgetFormerError as error:
        advice = "another --port, --grpc-port or --host, or stop the program that uses it"
        return Finding("port", "fail", str(error), advice)
    addresses = " and ".join(f"{settings.host}:{port}" for port in ports)
    return Finding("port", "ok", f"{addresses} {'is' if len(ports) == 1 else 'are'} free")


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    found = f"{'no limit' if unlimited else soft} (each connection uses one)"
    if not unlimited and soft < OPEN_FILES:
        limit = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        return Finding("open files", "warn", found, f"ulimit -n {limit}")
    return Finding("open files", "ok", found)


def _run_folder() -> Finding:
    try:
        with run_folder() as folder:
            return Finding("run folder", "ok", f"{Path(folder).parent} can be written")
    except BudgetFormerError as error:
        advice = "set TMPDIR to a folder that can be written"
        return Finding("run folder", "fail", str(error), advice)


def _traces() -> Finding:
    try:
        check_tracing()
    except BudgetFormerError as error:
        advice = "change the OTEL_* variables, or install the extra `tracing`"
        return Finding("traces", "fail", str(error), advice)
    exporter = exporter_asked_for(os.environ)
    return Finding("traces", "ok", "off" if exporter is None else f"sent by {exporter}")


def cpu_flags() -> set[str]:
    """Return the CPU's instruction sets as Linux names them; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(v.split()) for k, _, v in lines if k.strip() in ("flags", "Features")), set())


def available_memory() -> int:
    """Return the available bytes of the machine, or of the container if its limit is lower."""
    free = int(psutil.virtual_memory().available)
    return min([free, *(left for folder in cgroups("memory") for left in _memory_left(folder))])


def _memory_left(folder: Path) -> Iterator[int]:
    """Yield the available bytes of a control group, if it has a limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # without a limit the file holds "max"
            yield max(0, int((folder / limit).read_text()) - int((folder / usage).read_text()))


def _mib(size: int) -> int:
    return round(size / 2**20)
