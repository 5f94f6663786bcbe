"""The model that comes along is what the README says it is."""

import torch
from conftest import REPO
from safetensors import safe_open

from generator.pipeline import ChannelTokPipeline

DEMO = REPO / "weights" / "demo"


def test_it_is_small_and_of_256_tokens() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    pipeline = ChannelTokPipeline.from_pretrained(DEMO, "cpu")
    assert pipeline.layout.num_channels == 256
    assert len(pipeline.layout.class_names) == 100
    assert pipeline.layout.has_null_label
    assert pipeline.layout.first_block_counts
    assert pipeline.tokenizer.config.image_size == 64
    for part in ("tokenizer", "generator"):
        with safe_open(DEMO / part / "model.safetensors", "pt") as weights:
            assert {str(weights.get_slice(name).get_dtype()) for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_its_pictures_grow_finer_and_hang_on_the_class() -> None:
    """Further tokens change the picture less and less; another class makes another picture of the same seed."""
    pipeline = ChannelTokPipeline.from_pretrained(DEMO, "cpu")
    pictures: dict[int, torch.Tensor] = {}
    for step in pipeline.stream([0, 1, 2, 3, 0], seed=[0, 1, 2, 3, 1]):
        if step.num_tokens in (16, 64, 256):
            pictures[step.num_tokens] = torch.stack([torch.tensor(list(p.tobytes())) for p in step.preview()]).float()
    full = pictures[256]
    to_full = [float((pictures[k] - full).abs().mean()) for k in (16, 64)]
    between = float((full[:4] - full[:4].roll(1, 0)).abs().mean())
    assert to_full[1] < to_full[0] < between
    assert float((full[1] - full[4]).abs().mean()) > 5
    # neither flat nor noise: neighbours are alike, and far parts of a picture are not
    image = full.view(5, 64, 64, 3)
    near, far = (float((image - image.roll(shift, 2)).abs()[:, :, 32:].mean()) for shift in (1, 32))
    assert far > 1.5 * near > 3
