"""Peak of a device: listed GPUs by their names, everything else measured."""

import pytest
import torch

from training import peak
from training.peak import peak_of

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_listed_gpu_has_its_data_sheet_s_peak_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, name: str, tera: float | None
) -> None:
    measured = (7e12, "fastest square matrix product here")
    monkeypatch.setattr(peak, "measured_flops", lambda device, dtype: 7e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(CUDA, "bfloat16") == (measured if tera is None else (tera * 1e12, "data sheet"))
    assert peak_of(CUDA, "float32") == measured


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "LARGEST", peak.SMALLEST)
    found = peak_of(torch.device("cpu"), "float32")
    assert found.source == "fastest square matrix product here"
    assert 1e8 < found.flops < 1e14
