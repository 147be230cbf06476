"""The device that is here: its name in the catalogue, what it holds and draws, and how fast it can be at best.

Rows of the profiles carry a device's name, so a name that does not fit the machine is refused, never corrected.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.profiles import EdgeDevice, Gpu, Profiles

from ..parallel import synchronised_clock
from .timing import Meter

PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)

MIN_METERED_S = 1.0
"""NVML's energy counter moves only every few tens of milliseconds: shorter spans would be mostly rounding."""

CEILING_RUNS, LEAST_CEILING_RUNS, CEILING_S = 30, 4, 10.0
"""Runs of which the fastest is a ceiling, the first not counted, and how long they may take before there are fewer."""

_GIB = 2**30

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_SILENT_WORDS = {"nvidia", "tesla", "geforce", "generation"}

_FORMS = {"sxm", "pcie", "nvl"}

_SILENT_CPU_WORDS = {"cpu", "processor", "desktop", "laptop", "server"}


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """The device that rows are measured on: `name` in the catalogue, torch's device, CPU threads of a rank."""

    name: str
    device: str
    threads: int


def find_device(profiles: Profiles, name: str | None = None, threads: int | None = None) -> LocalDevice:
    """The device `name`, or the one that is here where none is named: a GPU before the CPU.

    Raises `InputError` for a name that is not in the catalogue or is not that of this machine, and where nothing in the
    catalogue fits.
    """
    threads = threads or torch.get_num_threads()
    known: dict[str, Gpu | EdgeDevice] = {**profiles.edge_devices, **profiles.gpus}
    if name is not None and name not in known:
        raise InputError(unknown_name("--device", name, tuple(known)))
    if name is None:
        name = _detect_device(profiles, threads)
    device = known[name]
    if isinstance(device, EdgeDevice) and device.device_class != "gpu":
        # Rows of this processor under any other device's name would be false: a name that says its cores is right for
        # as many threads; any other must be that of the chip which is here.
        cores = re.fullmatch(r"cpu-(\d+)core", device.name)
        if cores and int(cores[1]) != threads:
            remedy = f"Add --threads {cores[1]}, or name another device."
            raise InputError(Problem("--device", repr(name), f"{threads} threads do not make this device", remedy))
        if not cores and not matches_cpu(device, _cpu_called()):
            remedy = f"Name cpu-{threads}core, or add this chip to a catalogue of yours."
            raise InputError(Problem("--device", repr(name), f"the processor here is {_cpu_called()!r}", remedy))
        return LocalDevice(name, "cpu", threads)
    if not torch.cuda.is_available():
        remedy = "Run on a machine that has it, or name a CPU of the catalogue."
        raise InputError(Problem("--device", repr(name), "no CUDA device is here", remedy))
    if name not in (there := matching_gpus(profiles, *_card())):
        rule = f"the GPU here is {_card()[0]!r}, which the catalogue knows as {' or '.join(there) or 'nothing'}"
        raise InputError(Problem("--device", repr(name), rule))
    return LocalDevice(name, "cuda", threads)


def matches_cpu(device: EdgeDevice, called: str) -> bool:
    """Whether a system that names its processor so, such as `12th Gen Intel(R) Core(TM) i7-12700`, is this CPU.

    The words that say the model must be the same; clock, cores and generation, which only some systems tell, are not
    looked at.
    """
    return device.device_class == "cpu" and _cpu_words(device.label) == _cpu_words(called)


def _cpu_words(label: str) -> frozenset[str]:
    text = re.sub(r"\((r|tm)\)|@.*|\bwith .*|\b\d+th gen\b|\b[\w-]+-core\b", " ", label.lower())
    return frozenset(re.findall(r"[a-z0-9-]+", text)) - _SILENT_CPU_WORDS


def _detect_device(profiles: Profiles, threads: int) -> str:
    """The name of the device that is here: a GPU before the CPU."""
    if not torch.cuda.is_available():
        name = f"cpu-{threads}core"
        if name not in profiles.edge_devices:
            rule = "the catalogue has no device that is this many threads of a CPU"
            remedy = "Name the machine's row of the catalogue: --device."
            raise InputError(Problem("--threads", str(threads), rule, remedy))
        return name
    called, memory_gib = _card()
    names = matching_gpus(profiles, called, memory_gib)
    if len(names) != 1:
        rule = f"{'no row' if not names else ', '.join(names)} of the catalogue has {memory_gib:.0f} GiB and this name"
        raise InputError(Problem("--device", repr(called), rule, "Name its row: --device."))
    return names[0]


def _card() -> tuple[str, float]:
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / _GIB


def matching_gpus(profiles: Profiles, called: str, memory_gib: float) -> list[str]:
    """Names of the catalogue's GPUs that a driver calls so, such as `NVIDIA A100-SXM4-80GB`, with about this memory.

    Model words must be the same, a form factor (SXM, PCIe, NVL) where the driver says one, memory within 15 %: drivers
    keep a part for themselves.
    """
    model, form = _read_label(called)
    found = []
    for name, gpu in profiles.gpus.items():
        own_model, own_form = _read_label(gpu.label)
        same_memory = gpu.memory_gib is not None and abs(gpu.memory_gib - memory_gib) <= 0.15 * gpu.memory_gib
        if own_model == model and same_memory and (not form or not own_form or form == own_form):
            found.append(name)
    return found


def _read_label(label: str) -> tuple[frozenset[str], str]:
    """The words that say the model, and the form factor, if any. Of the H100s, drivers say HBM3 for the SXM one."""
    text = re.sub(r"\d+ ?gb\b", "", label.lower()).replace("hbm3", "sxm")
    words = {re.sub(r"^sxm\d$", "sxm", word) for word in re.findall(r"[a-z0-9]+", text)}
    return frozenset(words - _SILENT_WORDS - _FORMS), next(iter(words & _FORMS), "")


# ---- Meters ---------------------------------------------------------------------------------------------------------


class DeviceMeter(Meter):
    """Peak memory and energy of a device that this process has to itself.

    On CUDA the most bytes that torch held and NVML's energy counter; on a CPU the process's resident set, where Linux
    lets its high-water mark be reset, and no energy. Spans shorter than `MIN_METERED_S` have no energy: more timed
    runs (`--runs`) make a span longer.

    The peak is that since `start`; with `peak_from_now`, that since the meter was made. A replayed CUDA graph allocates
    nothing: what it holds was allocated in the runs that warmed it up.
    """

    def __init__(self, device: torch.device | str, *, peak_from_now: bool = False) -> None:
        self._device, self._peak_from_now = torch.device(device), peak_from_now
        self._resettable, self._time_mark_s = False, 0.0
        self._energy_mark_j: float | None = None
        if peak_from_now:
            self._reset_peak()

    def start(self) -> None:
        self._energy_mark_j, self._time_mark_s = _energy_j(self._device), synchronised_clock(self._device)
        if not self._peak_from_now:
            self._reset_peak()

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._resettable = False
            with suppress(OSError, ValueError):
                _CLEAR_REFS.write_text("5", encoding="ascii")  # lowers the mark to what the process holds now
                # some kernels accept the write and do nothing
                self._resettable = _status_bytes("VmHWM") <= 1.1 * _status_bytes("VmRSS")

    def peak_memory_bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") if self._resettable else None

    def energy_j(self) -> float | None:
        now_j = _energy_j(self._device)
        if self._energy_mark_j is None or now_j is None:
            return None
        long_enough = synchronised_clock(self._device) - self._time_mark_s >= MIN_METERED_S
        return now_j - self._energy_mark_j if long_enough else None


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if not found:
        raise ValueError(f"{_STATUS} does not say {field}")
    return int(found[1]) * 1024


def _energy_j(device: torch.device) -> float | None:
    """What a GPU has drawn since its driver was loaded; None where NVML does not say."""
    nvml = _nvml()
    if device.type != "cuda" or nvml is None:
        return None
    with suppress(nvml.NVMLError):
        torch.cuda.synchronize(device)
        # by UUID: torch may number the GPUs otherwise than NVML
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device.index or 0).uuid}")
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    return None


@lru_cache
def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return pynvml
    return None


# ---- The machine ----------------------------------------------------------------------------------------------------


def ceilings(here: LocalDevice, precision: str) -> dict[str, float]:
    """What this device does at best, measured now: the fastest of thirty runs of each.

    `matmul_<precision>_flop_per_s`: a matrix product, of 8192 x 8192 on a GPU and of 1024 x 1024 on a CPU.
    `conv_<precision>_flop_per_s`: a 3 x 3 convolution, for which torch may have a faster library, or on a GPU a coarser
    arithmetic (TF32), than for products. Both in the precision that is named and in the device's usual one, bf16 on a
    GPU and fp32 on a CPU. `copy_bytes_per_s` counts bytes read and bytes written. Fewer runs are made where thirty
    would take more than ten seconds.
    """
    on_gpu = here.device == "cuda"
    size, images, channels, side = (8192, 8, 640, 64) if on_gpu else (1024, 1, 320, 32)
    found: dict[str, float] = {}
    for name in dict.fromkeys((precision, "bf16" if on_gpu else "fp32")):
        draw = partial(torch.randn, generator=torch.Generator(here.device).manual_seed(0), device=here.device)
        # numbers as they occur: of ones, a GPU draws less power and clocks higher
        shapes = (size, size), (size, size), (images, channels, side, side), (channels, channels, 3, 3)
        left, right, image, kernel = (draw(shape).to(PRECISIONS[name]) for shape in shapes)
        if on_gpu:
            image, kernel = (tensor.to(memory_format=torch.channels_last) for tensor in (image, kernel))
        product_s = _fastest_s(partial(torch.matmul, left, right), here)
        convolution_s = _fastest_s(partial(torch.conv2d, image, kernel, padding=1), here)
        found[f"matmul_{name}_flop_per_s"] = 2.0 * size**3 / product_s
        found[f"conv_{name}_flop_per_s"] = 2.0 * kernel.numel() * images * side**2 / convolution_s
    source = torch.ones(2**29 if on_gpu else 2**25, device=here.device)
    copied = torch.empty_like(source)
    return found | {"copy_bytes_per_s": 2.0 * source.nbytes / _fastest_s(lambda: copied.copy_(source), here)}


@torch.inference_mode()
def _fastest_s(action: Callable[[], object], here: LocalDevice) -> float:
    clock = partial(synchronised_clock, torch.device(here.device))
    ends = [clock()]
    # a CPU that has no such arithmetic takes seconds for a product
    while len(ends) < LEAST_CEILING_RUNS or (len(ends) <= CEILING_RUNS and ends[-1] - ends[0] < CEILING_S):
        action()
        ends.append(clock())
    return min(end - start for start, end in pairwise(ends[1:]))


def driver(here: LocalDevice) -> str:
    """The GPU driver's version; empty on a CPU and where the system does not say.

    Read from /proc, so that it is there without NVML.
    """
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8") if here.device == "cuda" else ""
        if found := re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text):
            return found[1]
    return ""


def processor(here: LocalDevice) -> str:
    """What the chip calls itself."""
    return _card()[0] if here.device == "cuda" else _cpu_called()


def _cpu_called() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide how fast a step is."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "triton"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
