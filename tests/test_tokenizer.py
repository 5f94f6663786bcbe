import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from tokenizer import ChannelTokenizer, TokenizerConfig, swap_channels
from tokenizer.bsq import quantization_losses

GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "image_size": 32,
    "num_channels": 8,
    "patch_size": 2,
    "encoder_widths": [32, 32],
    "decoder_widths": [32],
    "num_bits": 8,
    "num_heads": 4,
}
PUBLISHED = TokenizerConfig(
    image_size=64,
    num_channels=16,
    num_bits=8,
    encoder_widths=[32, 32, 32, 64, 64],
    decoder_widths=[32, 32, 64],
    encoder_attention_sizes=[8],
    decoder_attention_sizes=[16],
    num_heads=4,
)


def refusal(action, *arguments, **settings):
    with pytest.raises(InputError) as caught:
        action(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def tokenizer():
    """Random weights, scaled up so that tokens differ from image to image and from channel to channel."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = ChannelTokenizer(TokenizerConfig(**TINY)).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            elif "bias" in name:
                parameter.zero_()
    return model


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_shapes_ranges_and_kinds(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    assert tokens.shape == (3, 8)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.config.codebook_size == 256
    assert len(tokens.unique()) > 12
    with torch.no_grad():
        latents = tokenizer.encode(images)
        assert latents.shape == (3, 8, 4, 4)
        assert tokenizer.quantize(latents).shape == (3, 8, 8)
    decoded = tokenizer.detokenize(tokens[:, :5])
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1


@torch.no_grad()
def zeroed_by_hand(tokenizer, images, lengths):
    """Latents as quantized from the images, channels from each row's length on set to zero."""
    codes = tokenizer.quantize(tokenizer.encode(images))
    latents = tokenizer.quantizer.project_out(codes).reshape(len(images), 8, 4, 4)
    for row, length in enumerate(lengths):
        latents[row, length:] = 0
    return latents


@pytest.mark.parametrize("k", [1, 4, 8])
def test_any_prefix_decodes_as_latents_zeroed_after_quantization(tokenizer, images, k):
    tokens = tokenizer.tokenize(images)
    expected = zeroed_by_hand(tokenizer, images, [k] * 3)
    assert torch.equal(tokenizer.lookup(tokens[:, :k]), expected)
    with torch.no_grad():
        assert torch.equal(tokenizer.detokenize(tokens[:, :k]), tokenizer.decode(expected))
    if k < 8:
        more = tokenizer.detokenize(tokens[:, : k + 1])
        assert (more - tokenizer.detokenize(tokens[:, :k])).abs().max() > 1e-4


def test_every_row_may_have_its_own_length(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    lengths = [1, 8, 4]
    expected = zeroed_by_hand(tokenizer, images, lengths)
    junk = tokens.clone()
    for row, length in enumerate(lengths):
        junk[row, length:] = 999
    for given in (tokens, junk):
        assert torch.equal(tokenizer.lookup(given, torch.tensor(lengths)), expected)
        with torch.no_grad():
            assert torch.equal(tokenizer.detokenize(given, torch.tensor(lengths)), tokenizer.decode(expected))


def test_own_lengths_work_on_a_prefix_too(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    found = tokenizer.lookup(tokens[:, :5], torch.tensor([2, 5, 1]))
    assert torch.equal(found, zeroed_by_hand(tokenizer, images, [2, 5, 1]))


def test_training_forward_sees_only_kept_channels(tokenizer, images):
    keep = torch.arange(8) < torch.tensor([[2], [8], [5]])
    found = tokenizer(images, keep)
    expected = tokenizer.decode(zeroed_by_hand(tokenizer, images, [2, 8, 5]))
    torch.testing.assert_close(found.images, expected, atol=1e-5, rtol=0)


def test_training_forward_keeps_the_quantizer_in_float32_under_autocast(tokenizer, images):
    keep = torch.ones(3, 8, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = tokenizer(images, keep).vectors
        terms = quantization_losses(vectors, keep)
    assert vectors.dtype == torch.float32
    assert {terms.token_entropy.dtype, terms.codebook_entropy.dtype, terms.commitment.dtype} == {torch.float32}
    outside = quantization_losses(vectors, keep)
    assert torch.equal(terms.codebook_entropy, outside.codebook_entropy)


@pytest.mark.parametrize("shape", [(3, 0), (3, 9), (3,), (3, 8, 1)])
def test_number_of_tokens_out_of_range_is_refused(tokenizer, shape):
    assert "1..8" in refusal(tokenizer.detokenize, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("lengths", [[0, 1, 1], [1, 6, 1], [-1, 1, 1], [1, 1], [[1], [1], [1]]])
def test_own_lengths_out_of_range_are_refused(tokenizer, lengths):
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    assert "1..5" in refusal(tokenizer.detokenize, tokens, torch.tensor(lengths))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 1, 32, 32), (3, 32, 32), (1, 3, 32, 16)])
def test_images_of_another_size_are_refused(tokenizer, shape):
    assert "(b, 3, 32, 32)" in refusal(tokenizer.tokenize, torch.zeros(shape))


def test_save_and_load_gives_the_same_bits(tokenizer, images, folder):
    loaded = ChannelTokenizer.from_pretrained(folder)
    assert not loaded.training
    ours, theirs = tokenizer.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = tokenizer.tokenize(images)
    assert torch.equal(loaded.tokenize(images), tokens)
    assert torch.equal(loaded.detokenize(tokens[:, :3]), tokenizer.detokenize(tokens[:, :3]))
    assert {name: loaded.config.to_dict()[name] for name in TINY} == TINY


@pytest.mark.parametrize("left", [0, 4, 100, 400_000, -1])
def test_truncated_weights_are_refused(folder, left):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    assert str(weights) in refusal(ChannelTokenizer.from_pretrained, folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    assert str(folder / name) in refusal(ChannelTokenizer.from_pretrained, folder)


def test_a_missing_shard_is_refused(folder):
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "model-00001-of-00001.safetensors")}
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00001.safetensors" in refusal(ChannelTokenizer.from_pretrained, folder)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_of_another_type_is_refused(folder):
    edit_config(folder, model_type="llama")
    message = refusal(ChannelTokenizer.from_pretrained, folder)
    assert "'llama'" in message
    assert "'channeltok'" in message


@pytest.mark.parametrize("changes", [{"num_bits": 99}, {"num_bits": "many"}, {"encoder_widths": None}])
def test_a_config_file_with_a_bad_value_is_refused(folder, changes):
    edit_config(folder, **changes)
    assert next(iter(changes)) in refusal(ChannelTokenizer.from_pretrained, folder)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_config_file_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(ChannelTokenizer.from_pretrained, folder)


def test_misshapen_weights_are_refused(folder):
    edit_config(folder, num_channels=4)
    assert "decoder.trunk.0.weight" in refusal(ChannelTokenizer.from_pretrained, folder)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_missing_or_unknown_weight_is_refused(folder, change):
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        del state["encoder.trunk.0.bias"]
    else:
        state["encoder.trunk.99.bias"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    message = refusal(ChannelTokenizer.from_pretrained, folder)
    assert ("encoder.trunk.0.bias" if change == "missing" else "encoder.trunk.99.bias") in message


def test_a_name_that_is_no_folder_is_refused(tmp_path):
    assert str(tmp_path / "nothing") in refusal(ChannelTokenizer.from_pretrained, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("image_size", 48),
        ("image_size", 64),
        ("num_channels", 0),
        ("latent_size", 0),
        ("latent_size", 3),
        ("num_bits", 0),
        ("num_bits", 17),
        ("patch_size", 0),
        ("patch_size", 3),
        ("num_heads", 0),
        ("num_heads", 3),
        ("encoder_widths", [32]),
        ("encoder_widths", [32, 33]),
        ("encoder_widths", [32, 0]),
        ("encoder_widths", [32] * 6),
        ("decoder_widths", []),
        ("decoder_widths", [16]),
        ("decoder_widths", [32, 32]),
    ],
)
def test_a_bad_value_in_the_configuration_is_named(field, value):
    assert field in refusal(TokenizerConfig, **TINY | {field: value})


def test_an_unknown_field_in_the_configuration_is_refused_with_the_nearest():
    assert "num_bits" in refusal(TokenizerConfig, **TINY, nmu_bits=8)


@pytest.fixture(scope="module")
def published():
    return load_file(GOLDEN / "tiny_proj.state.safetensors")


def import_published(state, folder, **settings):
    save_file(state, folder / "published.safetensors")
    return ChannelTokenizer.from_published(folder / "published.safetensors", PUBLISHED, **settings)


def test_published_weights_with_a_missing_key_are_refused(published, tmp_path):
    state = {name: value for name, value in published.items() if name != "decoder.model.0.bias"}
    assert "decoder.trunk.0.bias" in refusal(import_published, state, tmp_path)


def test_published_weights_with_an_extra_key_are_refused(published, tmp_path):
    for name in ("decoder.model.99.bias", "discriminator.weight"):
        refusal(import_published, published | {name: torch.zeros(1)}, tmp_path)


def test_two_published_keys_of_one_meaning_are_refused(published, tmp_path):
    twin = published["encoder.model.20.gn.weight"] + 1
    refusal(import_published, published | {"encoder.model.20.weight": twin}, tmp_path)


def test_published_weights_of_another_shape_are_refused(published, tmp_path):
    message = refusal(import_published, published | {"decoder.model.0.bias": torch.zeros(3)}, tmp_path)
    assert "(3,)" in message
    assert "(64,)" in message


def test_published_weights_with_another_bit_order_are_refused(published, tmp_path):
    assert "quantizer.mask" in refusal(
        import_published, published | {"quantizer.mask": published["quantizer.mask"].flip(0)}, tmp_path
    )


def test_a_wrong_prefix_is_refused(published, tmp_path):
    assert "'module.'" in refusal(import_published, published, tmp_path, prefix="module.")
    prefixed = {f"model.{name}": value for name, value in published.items()}
    refusal(import_published, prefixed, tmp_path)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model._orig_mod."])
def test_published_weights_in_a_pt_file_under_any_prefix(published, tmp_path, prefix):
    path = tmp_path / "last.pt"
    torch.save({"state_dict": {prefix + name: value for name, value in published.items()}, "epoch": 3}, path)
    model = ChannelTokenizer.from_published(path, PUBLISHED, prefix=prefix, state_key="state_dict")
    assert torch.equal(model.encoder.trunk[0].weight, published["encoder.model.0.weight"])
    assert torch.equal(model.decoder.trunk[-1].bias, published["decoder.model.26.bias"])
    assert not model.training
    assert "'ema'" in refusal(ChannelTokenizer.from_published, path, PUBLISHED, prefix=prefix, state_key="ema")
    assert "state_dict" in refusal(ChannelTokenizer.from_published, path, PUBLISHED, prefix=prefix)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_object_is_refused_and_never_run(published, tmp_path, zipped):
    target, path = tmp_path / "executed", tmp_path / "evil.pt"
    content = {"state_dict": published, "extra": Payload(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert str(path) in refusal(ChannelTokenizer.from_published, path, PUBLISHED, state_key="state_dict")
    assert not target.exists()
    torch.load(path, weights_only=False)  # noqa: TID251 - the payload does work where somebody trusts it
    assert target.exists()


def test_a_saved_folder_survives_a_copy(folder, tmp_path, images, tokenizer):
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    copied = ChannelTokenizer.from_pretrained(tmp_path / "elsewhere")
    assert torch.equal(copied.tokenize(images), tokenizer.tokenize(images))


@pytest.mark.parametrize(("start", "end"), [(0, 8), (0, 1), (7, 8), (2, 5)])
def test_swapping_exchanges_these_channels_and_no_others(start, end):
    first, second = torch.arange(16).reshape(2, 8), torch.arange(100, 116).reshape(2, 8)
    before = first.clone(), second.clone()
    mixed, other = swap_channels(first, second, start, end)
    for channel in range(8):
        inside = start <= channel < end
        assert torch.equal(mixed[:, channel], before[1 if inside else 0][:, channel])
        assert torch.equal(other[:, channel], before[0 if inside else 1][:, channel])
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    again = swap_channels(mixed, other, start, end)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)


def test_swapping_all_channels_exchanges_the_pictures(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    mixed, other = swap_channels(tokens[:1], tokens[1:2], 0, 8)
    assert torch.equal(tokenizer.detokenize(mixed), tokenizer.detokenize(tokens[1:2]))
    assert torch.equal(tokenizer.detokenize(other), tokenizer.detokenize(tokens[:1]))


@pytest.mark.parametrize(("start", "end"), [(-1, 4), (4, 4), (5, 4), (0, 9), (8, 9)])
def test_swapping_outside_the_channels_is_refused(start, end):
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    message = refusal(swap_channels, tokens, tokens, start, end)
    assert f"{start}..{end}" in message
    assert "<= 8" in message


@pytest.mark.parametrize("shapes", [((2, 8), (2, 7)), ((2, 8), (1, 8)), ((8,), (8,)), ((2, 8), (8,))])
def test_swapping_between_unlike_shapes_is_refused(shapes):
    message = refusal(swap_channels, *(torch.zeros(shape, dtype=torch.int64) for shape in shapes), 0, 4)
    assert str(shapes[0]) in message
    assert str(shapes[1]) in message
