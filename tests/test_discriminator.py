import itertools

import pytest
import torch

from common.config import InputError
from tokenizer.losses import PatchDiscriminator, discriminator_loss
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


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, side):
    model = PatchDiscriminator(GanConfig(gan_width=32, gan_layers=layers))
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # its statistics see the whole picture
    image = pictures(1, 96).requires_grad_()
    logits = model(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min() + 1) == side


def test_hinge_loss_is_that_of_a_loop_over_patches_and_has_gradients_for_the_weights_only(small):
    real, fake = pictures(2, seed=1), pictures(2, seed=2).requires_grad_()
    found = discriminator_loss(small, real, fake)
    logits = [small(real).flatten().tolist(), small(fake).flatten().tolist()]
    losses = [max(0.0, 1 - logit) for logit in logits[0]], [max(0.0, 1 + logit) for logit in logits[1]]
    expected = 0.5 * (sum(losses[0]) / len(losses[0]) + sum(losses[1]) / len(losses[1]))
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)
    for name, values in zip(("real", "fake"), logits, strict=True):
        assert found[name].item() == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6)
    found["loss"].backward()
    assert fake.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters() if p.ndim > 1)
    small.zero_grad(set_to_none=True)


def test_a_frozen_call_has_gradients_for_its_inputs_only(small):
    fake = pictures(2, seed=2).requires_grad_()
    logits = call_frozen(small, fake)
    torch.testing.assert_close(logits, small(fake))
    torch.testing.assert_close(logits[1:], small(fake[1:]))  # no other picture of the batch matters
    logits.mean().backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in small.parameters())


def test_training_separates_pictures_from_noise():
    torch.manual_seed(0)
    model = PatchDiscriminator(GanConfig(gan_width=32, gan_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.5, 0.9))
    smooth = torch.nn.functional.interpolate(pictures(8, 4), 32, mode="bilinear")
    for _ in range(10):
        found = discriminator_loss(model, smooth, pictures(8))
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    assert found["real"] > found["fake"] + 0.5


def test_settings_and_images_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="gan_width is 48; it must be a multiple of 32"):
        GanConfig(gan_width=48)
    for layers in (1, 3):
        config = GanConfig(gan_weight=0.1, gan_width=32, gan_layers=layers)
        smallest = 4 * 2**layers
        config.check_image_size(smallest)
        assert PatchDiscriminator(config)(pictures(1, smallest)).numel() >= 1
        with pytest.raises(InputError, match="gan_layers"):
            config.check_image_size(smallest // 2)
    GanConfig(gan_layers=3).check_image_size(4)  # without a discriminator
