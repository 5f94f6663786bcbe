"""The refiner's flow against closed forms."""

from typing import Any

import numpy as np
import pytest
import torch
from test_refiner import C, tiny_refiner
from torch import Tensor

from common.config import InputError
from common.randomness import normals, uniforms
from refiner.flow import flow_loss, integrate, scale_table


class GaussianFlow:
    """The exact velocity between noise and a Gaussian of standard deviation s, which turns noise n into s n.

    The mean of the Gaussian is that of the class: 3 for class 0, -1 for the null label.
    """

    config = tiny_refiner("x").config
    s = 0.4

    def __call__(self, point: Tensor, decoded: Tensor, time: Tensor, num_tokens: Tensor, labels: Tensor) -> Tensor:
        t = time[:, None, None, None]
        mean = torch.where(labels == 0, 3.0, -1.0)[:, None, None, None]
        variance = (t * self.s) ** 2 + (1 - t) ** 2
        return mean + (t * self.s**2 - (1 - t)) / variance * (point - t * mean)


def test_the_integration_reaches_the_end_of_a_known_flow() -> None:
    flow: Any = GaussianFlow()
    decoded, noise = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    num_tokens, labels, scales = torch.tensor([1, C]), torch.zeros(2, dtype=torch.long), scale_table(flow.config)
    found = integrate(flow, decoded, num_tokens, labels, noise, 200, 1.0, scales)
    expected = decoded + torch.tensor([0.5, 0.25])[:, None, None, None] * (3 + flow.s * noise)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    # the velocity is linear in the mean, so guidance 2 shifts it to 2 * 3 - (-1) at constant deviation
    guided = integrate(flow, decoded, num_tokens, labels, noise, 200, 2.0, scales)
    assert (guided - found).mean() > 0.5
    # Heun's method has an error of second order
    errors = [
        (integrate(flow, decoded, num_tokens, labels, noise, n, 1.0, scales) - expected).abs().max() for n in (8, 16)
    ]
    assert errors[1] < 0.4 * errors[0]


def test_the_loss_of_the_exact_velocity_is_its_variance_and_scales_are_interpolated() -> None:
    scales = scale_table(tiny_refiner("x").config)
    assert scales[0] == 0.5
    assert scales[C - 1] == 0.25
    assert scales[3].item() == pytest.approx(0.375)  # log 4 is half of log 16
    images, decoded, noise = (torch.randn(3, 3, 4, 4) for _ in range(3))
    num_tokens, moments = torch.tensor([1, 4, 16]), torch.tensor([0.0, 0.25, 1.0])
    residual = (images - decoded) / torch.tensor([0.5, 0.375, 0.25])[:, None, None, None]

    def model(point: Tensor, given: Tensor, time: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        for i, t in enumerate((0.0, 0.25, 1.0)):
            torch.testing.assert_close(point[i], t * residual[i] + (1 - t) * noise[i])
        return residual - noise + 2

    found = flow_loss(model, images, decoded, num_tokens, torch.zeros(3), scales, noise, moments)
    torch.testing.assert_close(found, torch.full((3,), 4.0), atol=1e-4, rtol=0)


def test_noise_is_a_function_of_the_seed() -> None:
    noise = normals([5, 6, 2**63 - 1], 3, 50, 50)
    assert torch.equal(normals([6], 3, 50, 50)[0], noise[1])
    # another key of the generator than that of `uniforms`
    of_uniforms = np.random.Generator(np.random.Philox(key=6)).standard_normal((3, 50, 50), np.float32)
    assert not np.array_equal(noise[1].numpy(), of_uniforms)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    correlations = np.corrcoef([*noise.flatten(1).numpy(), uniforms([5], 7500)[0].numpy()])
    assert np.abs(correlations - np.eye(4)).max() < 0.06
    with pytest.raises(InputError, match="out of range"):
        normals([-1], 2)
