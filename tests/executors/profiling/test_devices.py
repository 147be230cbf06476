from __future__ import annotations

import pytest
import torch

from executors.profiling import LocalDevice, find_device
from executors.profiling.devices import ceilings, matches_cpu, matching_gpus
from hybridsd_sim import load_profiles
from hybridsd_sim.errors import InputError

PROFILES = load_profiles()


@pytest.mark.parametrize(
    ("called", "memory_gib", "name"),
    [
        ("NVIDIA H200", 139.8, "h200-sxm"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H100 NVL", 93.1, "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-sxm-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-sxm-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-pcie-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-pcie-40gb"),
        ("Tesla V100-SXM2-16GB", 15.8, "v100-sxm2-16gb"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-sxm2-32gb"),
        ("Tesla T4", 14.6, "t4"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA A10G", 22.0, "a10g"),
        ("NVIDIA A10", 22.0, "a10"),
        ("NVIDIA RTX A5000", 23.7, "rtx-a5000"),
        ("NVIDIA RTX A6000", 47.4, "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, "rtx-6000-ada"),
        ("NVIDIA GeForce RTX 2080 Ti", 10.8, "rtx-2080ti"),
        ("NVIDIA GeForce RTX 3060", 11.8, "rtx-3060"),
        ("NVIDIA GeForce RTX 3090", 23.7, "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx-4090"),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(called, memory_gib, name) -> None:
    """A driver's name and the memory that it reports lead to one GPU of the catalogue."""
    assert matching_gpus(PROFILES, called, memory_gib) == [name]


@pytest.mark.parametrize(
    ("called", "memory_gib"),
    [
        ("NVIDIA GeForce RTX 3080 Ti", 11.8),
        ("NVIDIA GeForce RTX 3060", 7.8),
        ("NVIDIA H200 NVL", 139.8),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7),
        ("NVIDIA B200", 178.0),
    ],
)
def test_a_gpu_that_only_resembles_one_is_not_taken_for_it(called, memory_gib) -> None:
    """Another variant, form factor or memory is another device."""
    assert matching_gpus(PROFILES, called, memory_gib) == []


def test_an_unknown_device_is_refused_with_the_names_that_are_near() -> None:
    """A device that the catalogue lacks is named with the closest ones."""
    with pytest.raises(InputError, match="rtx-4090"):
        find_device(PROFILES, "rtx-4091")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("name", ["h200-sxm", "rtx-4090"])
def test_no_rows_are_written_for_a_gpu_that_is_not_here(name) -> None:
    """On a machine without CUDA the name of a GPU is refused, also where the catalogue has it as an edge device."""
    with pytest.raises(InputError, match="no CUDA device is here"):
        find_device(PROFILES, name)


def test_a_device_named_by_its_cores_wants_as_many_threads() -> None:
    """One thread does not make a computer with two cores, and two do."""
    with pytest.raises(InputError, match="--threads 2"):
        find_device(PROFILES, "cpu-2core", threads=1)
    assert find_device(PROFILES, "cpu-2core", threads=2) == LocalDevice("cpu-2core", "cpu", 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA device would be found")
def test_a_cpu_is_named_by_its_threads() -> None:
    """Two threads of a CPU are the catalogue's computer with two cores; a number that it lacks must be named."""
    assert find_device(PROFILES, threads=2).name == "cpu-2core"
    with pytest.raises(InputError, match="--device"):
        find_device(PROFILES, threads=61)


@pytest.mark.parametrize("name", ["iphone-14-pro-max", "snapdragon-x-elite", "mac-studio-m2-ultra", "jetson-agx-orin"])
def test_no_rows_are_written_for_a_phone_or_a_computer_that_is_not_here(name) -> None:
    """This machine's CPU measures nothing under another device's name, whatever the threads; it is told its own."""
    with pytest.raises(InputError, match=r"the processor here is .*\. Name cpu-2core"):
        find_device(PROFILES, name, threads=2)


@pytest.mark.parametrize(
    ("called", "fits"),
    [
        ("12th Gen Intel(R) Core(TM) i7-12700", True),
        ("Intel(R) Core(TM) i7-12700 CPU @ 2.10GHz", True),
        ("12th Gen Intel(R) Core(TM) i7-12700 12-Core Processor", True),
        ("12th Gen Intel(R) Core(TM) i7-12700K", False),
        ("Intel(R) Core(TM) i7-1270P", False),
        ("AMD EPYC 7763 64-Core Processor", False),
        ("", False),
    ],
)
def test_a_cpu_is_known_by_what_the_system_calls_it(called, fits) -> None:
    """The model must be the same to the letter; generation, clock and cores do not matter."""
    assert matches_cpu(PROFILES.edge_devices["core-i7-12700"], called) is fits


def test_a_phone_is_no_cpu_though_it_were_called_so() -> None:
    """Only devices of the class `cpu` are processors."""
    phone = PROFILES.edge_devices["iphone-13"]
    assert not matches_cpu(phone, phone.label)


def test_ceilings_say_what_they_are() -> None:
    """A CPU's ceilings are FLOPs of fp32 products and convolutions and bytes of copies, a second; all are positive."""
    measured = ceilings(LocalDevice("cpu-1core", "cpu", 1), "fp32")
    assert list(measured) == ["matmul_fp32_flop_per_s", "conv_fp32_flop_per_s", "copy_bytes_per_s"]
    assert min(measured.values()) > 1e6


def test_ceilings_are_those_of_the_precision_and_of_the_usual_one() -> None:
    """A sweep in bf16 is compared with bf16 arithmetic; fp32 is measured all the same."""
    measured = ceilings(LocalDevice("cpu-1core", "cpu", 1), "bf16")
    arithmetic = [f"{kind}_{precision}_flop_per_s" for precision in ("bf16", "fp32") for kind in ("matmul", "conv")]
    assert list(measured) == [*arithmetic, "copy_bytes_per_s"]
