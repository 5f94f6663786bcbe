import itertools

import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from tokenizer.discriminator import PatchDiscriminator, discriminator_loss, gradient_ratio, last_layer_gradients
from tokenizer.settings import GanConfig
from training.model_state import call_frozen


def pictures(count, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(GanConfig(gan_width=32, gan_layers=2))


def test_the_paper_s_discriminator_has_the_size_of_a_patchgan():
    with torch.device("meta"):
        model = PatchDiscriminator(GanConfig())
        logits = model(torch.empty(2, 3, 256, 256))
    widths = [3, 64, 128, 256, 512]
    convolutions = sum(16 * a * b + b for a, b in itertools.pairwise(widths)) + 16 * 512 + 1
    norms = 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in model.parameters()) == convolutions + norms == 2_766_529
    assert logits.shape == (2, 1, 30, 30)  # patches of 70 pixels, as in the PatchGAN paper


def receptive_field(config, size):
    """Side of the patch that one logit sees, by the gradient."""
    torch.manual_seed(1)
    model = PatchDiscriminator(config)
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # its statistics see the whole picture
    image = pictures(1, size).requires_grad_()
    logits = model(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    return int(rows.max() - rows.min() + 1)


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, side):
    assert receptive_field(GanConfig(gan_width=32, gan_layers=layers), 128) == side


def test_the_logits_of_a_picture_do_not_depend_on_the_batch(small):
    images = pictures(3)
    torch.testing.assert_close(small(images)[1:2], small(images[1:2]))


def test_hinge_loss_is_that_of_a_loop_over_patches(small):
    real, fake = pictures(2, seed=1), pictures(2, seed=2)
    found = discriminator_loss(small, real, fake)
    logits = [small(real).flatten().tolist(), small(fake).flatten().tolist()]
    losses = [max(0.0, 1 - logit) for logit in logits[0]], [max(0.0, 1 + logit) for logit in logits[1]]
    expected = 0.5 * (sum(losses[0]) / len(losses[0]) + sum(losses[1]) / len(losses[1]))
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert found["real"].item() == pytest.approx(sum(logits[0]) / len(logits[0]), rel=1e-4, abs=1e-6)
    assert found["fake"].item() == pytest.approx(sum(logits[1]) / len(logits[1]), rel=1e-4, abs=1e-6)


def test_the_discriminator_s_loss_has_gradients_for_its_weights_only(small):
    fake = pictures(2, seed=2).requires_grad_()
    discriminator_loss(small, pictures(2), fake)["loss"].backward()
    assert fake.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters() if p.ndim > 1)
    small.zero_grad(set_to_none=True)


def test_a_frozen_call_has_gradients_for_its_inputs_only(small):
    fake = pictures(2, seed=2).requires_grad_()
    logits = call_frozen(small, fake)
    torch.testing.assert_close(logits, small(fake))
    logits.mean().backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in small.parameters())


def test_training_separates_pictures_from_noise(small):
    torch.manual_seed(0)
    model = PatchDiscriminator(GanConfig(gan_width=32, gan_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.5, 0.9))
    smooth = F.interpolate(pictures(8, 4), 32, mode="bilinear")
    for _ in range(20):
        found = discriminator_loss(model, smooth, pictures(8))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert found["real"] > found["fake"] + 0.5


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    layer = torch.nn.Conv2d(4, 3, 3)
    out = layer(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    reconstruction, adversarial = out.square().mean(), 0.01 * out.sum()
    first, second = last_layer_gradients(reconstruction, adversarial, layer.weight)
    weight = gradient_ratio(first, second)
    (balanced,) = torch.autograd.grad(weight * adversarial, layer.weight)
    assert balanced.norm().item() == pytest.approx(first.norm().item(), rel=1e-3)
    assert not weight.requires_grad
    assert gradient_ratio(first, torch.zeros_like(first)).item() <= 1e4


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gan_weight": -0.1}, "gan_weight"),
        ({"gan_weight": float("nan")}, "gan_weight"),
        ({"gan_weighting": "auto"}, "gan_weighting"),
        ({"gan_start_step": -1}, "gan_start_step"),
        ({"gan_learning_rate": 0.0}, "gan_learning_rate"),
        ({"gan_width": 48}, "gan_width"),
        ({"gan_layers": 0}, "gan_layers"),
    ],
)
def test_bad_settings_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        GanConfig(**settings)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_pictures_without_a_patch_are_refused_and_the_smallest_have_one(layers):
    config = GanConfig(gan_weight=0.1, gan_width=32, gan_layers=layers)
    smallest = 4 * 2**layers
    config.check_image_size(smallest)
    assert PatchDiscriminator(config)(pictures(1, smallest)).numel() >= 1
    with pytest.raises(InputError, match="gan_layers"):
        config.check_image_size(smallest // 2)
    GanConfig(gan_layers=layers).check_image_size(4)
