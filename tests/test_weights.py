"""The model in weights/demo is what the README says it is."""

import torch
from conftest import REPO
from safetensors import safe_open

from common.config import Refinement
from generator.pipeline import ChannelTokPipeline
from generator.sampling import code_log_probabilities

DEMO = REPO / "weights" / "demo"


def test_it_is_small_and_of_256_tokens() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 57.5e6  # 60 MB with the classifier
    pipeline = ChannelTokPipeline.from_pretrained(DEMO, "cpu")
    assert pipeline.config.num_channels == 256
    assert len(pipeline.config.class_names) == 100
    assert pipeline.config.has_null_label
    assert pipeline.tokenizer.config.image_size == 64
    assert pipeline.refinement(None) == Refinement(4, cfg_scale=3.0, temperature=0.97)
    assert pipeline.sampling().cfg_scale == 3  # sampling.json belongs to these weights
    for part in ("tokenizer", "generator", "refiner"):
        with safe_open(DEMO / part / "model.safetensors", "pt") as weights:
            assert {str(weights.get_slice(name).get_dtype()) for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_its_pictures_become_finer_and_depend_on_the_class() -> None:
    """Later tokens change the picture less; another class gives another picture of the same seed."""
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
    # neither flat nor noise: neighbouring pixels are similar, distant ones are not
    image = full.view(5, 64, 64, 3)
    near, far = (float((image - image.roll(shift, 2)).abs()[:, :, 32:].mean()) for shift in (1, 32))
    assert far > 1.5 * near > 3


def test_odds_of_an_image_do_not_depend_on_the_batch() -> None:
    """Up to rounding, which a trained model must not amplify."""
    pipeline = ChannelTokPipeline.from_pretrained(DEMO, "cpu")
    engine, config = pipeline.engine, pipeline.config
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.codebook_size, (20, 32), generator=rng)

    @torch.no_grad()
    def odds_of_the_first(images: int) -> torch.Tensor:
        batch = engine.begin(
            torch.arange(images), tokens[:images], torch.full((images,), 32), torch.zeros(images, 32),
            torch.ones(config.num_channels), guided=False,
        )  # fmt: skip
        found = []
        for _ in range(32):
            hidden = engine._blocks(batch, engine._length(batch))
            found.append(code_log_probabilities(*engine._odds(batch, hidden, guided=False))[0])
            engine.feed(batch)
        return torch.stack(found)

    alone, among_others = odds_of_the_first(1), odds_of_the_first(20)
    assert alone.std() > 1
    torch.testing.assert_close(alone, among_others, atol=5e-5, rtol=0)
