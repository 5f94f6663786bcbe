"""What a device can do at most: known GPUs by their names, everything else measured."""

import pytest
import torch

from training import peak
from training.peak import peak_of

CUDA = torch.device("cuda")


@pytest.fixture
def name_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(peak, "measured_flops", lambda device, dtype: 7e12)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A40", 150),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(name_gpu: pytest.MonkeyPatch, name: str, tera: float) -> None:
    name_gpu.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(CUDA, "bfloat16") == (tera * 1e12, "data sheet")
    # data sheets are of bfloat16
    assert peak_of(CUDA, "float32") == (7e12, "fastest square matrix product here")


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA H20",
        "NVIDIA GB200",
        "NVIDIA RTX A4000",
        "AMD Instinct MI300X",
    ],
)
def test_a_gpu_of_a_similar_name_is_measured(name_gpu: pytest.MonkeyPatch, name: str) -> None:
    name_gpu.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(CUDA, "bfloat16") == (7e12, "fastest square matrix product here")


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "LARGEST", peak.SMALLEST)
    found = peak_of(torch.device("cpu"), "float32")
    assert found.source == "fastest square matrix product here"
    assert 1e8 < found.flops < 1e14
