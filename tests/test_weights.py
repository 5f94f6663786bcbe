"""The model that comes along is what the README says it is."""

import torch
from conftest import REPO
from safetensors import safe_open

from generator.model import load_generator
from generator.pipeline import ChannelTokPipeline
from generator.positions import counted_vectors

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


def test_an_image_s_logits_are_those_it_has_in_company() -> None:
    """Up to rounding, which the block that counts would enlarge a hundredfold if it were part of a step."""
    pipeline = ChannelTokPipeline.from_pretrained(DEMO, "cpu")
    engine, layout = pipeline.engine, pipeline.layout
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(layout.codebook_size, (20, 32), generator=rng)

    @torch.no_grad()
    def logits_of_the_first(images: int) -> torch.Tensor:
        batch = engine.begin(
            torch.arange(images), tokens[:images], torch.full((images,), 32), torch.zeros(images, 32),
            torch.ones(layout.num_channels), guided=False,
        )  # fmt: skip
        found = []
        for _ in range(32):
            found.append(engine._forward(batch, engine._length(batch), with_logits=True)[0].clone())
            engine.feed(batch)
        return torch.stack(found)

    alone, in_company = logits_of_the_first(1), logits_of_the_first(20)
    assert alone.std() > 1
    torch.testing.assert_close(alone, in_company, atol=5e-5, rtol=0)


def test_what_the_first_block_adds_hangs_on_no_mode_of_the_model() -> None:
    llama, layout = load_generator(DEMO / "generator")
    calm = counted_vectors(llama, layout.num_channels)
    llama.train()
    llama.set_attn_implementation("eager")
    for block in llama.model.layers:
        block.self_attn.attention_dropout = 0.5
    torch.testing.assert_close(counted_vectors(llama, layout.num_channels), calm, atol=1e-3, rtol=0)
