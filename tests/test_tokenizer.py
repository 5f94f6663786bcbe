import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.config import InputError
from tokenizer import ChannelTokenizer, TokenizerConfig

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
    assert (tokens.shape, tokens.dtype) == ((3, 8), torch.int64)
    assert 0 <= tokens.min() <= tokens.max() < tokenizer.config.codebook_size == 256
    assert len(tokens.unique()) > 12
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
    found = tokenizer.lookup(tokens[:, :5], torch.tensor([2, 5, 1]))
    assert torch.equal(found, zeroed_by_hand(tokenizer, images, [2, 5, 1]))


def test_training_forward_sees_only_kept_channels(tokenizer, images):
    found, _ = tokenizer(images, torch.arange(8) < torch.tensor([[2], [8], [5]]))
    expected = tokenizer.decode(zeroed_by_hand(tokenizer, images, [2, 8, 5]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_shapes_and_lengths_out_of_range_are_refused(tokenizer):
    for shape in ((3, 0), (3, 9), (3,), (3, 8, 1)):
        assert "1..8" in refusal(tokenizer.detokenize, torch.zeros(shape, dtype=torch.int64))
    for lengths in ([0, 1, 1], [1, 6, 1], [1, 1], [[1], [1], [1]]):
        assert "1..5" in refusal(tokenizer.detokenize, torch.zeros(3, 5, dtype=torch.int64), torch.tensor(lengths))
    for shape in ((1, 3, 64, 64), (1, 1, 32, 32), (3, 32, 32), (1, 3, 32, 16)):
        assert "(b, 3, 32, 32)" in refusal(tokenizer.tokenize, torch.zeros(shape))


@pytest.mark.parametrize("value", [-1, 2**40, 0.5, True])
def test_tokens_out_of_range_are_refused(tokenizer, value):
    tokens = torch.zeros(2, 3, dtype=torch.tensor(value).dtype)
    tokens[1, 2] = value
    assert "tokens" in refusal(tokenizer.detokenize, tokens)
    if isinstance(value, int) and value is not True:  # not where they are not used
        tokenizer.detokenize(tokens, torch.tensor([3, 2]))
    largest = torch.full((1, 1), tokenizer.config.codebook_size - 1)
    assert torch.equal(tokenizer.detokenize(largest.to(torch.uint16)), tokenizer.detokenize(largest))
    assert "allowed are" in refusal(tokenizer.detokenize, largest + 1)


def test_a_model_is_loaded_with_the_bits_it_was_saved_with(tokenizer, images, folder, tmp_path):
    folder = folder.rename(tmp_path / "elsewhere")
    loaded = ChannelTokenizer.from_pretrained(folder)
    assert loaded.config == tokenizer.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    (folder / "model.safetensors").write_bytes(b"")  # the weights are a copy of the file's
    ours, theirs = tokenizer.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = tokenizer.tokenize(images)
    assert torch.equal(loaded.tokenize(images), tokens)
    assert torch.equal(loaded.detokenize(tokens[:, :3]), tokenizer.detokenize(tokens[:, :3]))


def test_number_formats_of_file_and_model_are_independent(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path, torch.bfloat16)
    assert tokenizer.dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        loaded = ChannelTokenizer.from_pretrained(tmp_path, dtype=dtype)
        assert (loaded.dtype, loaded.device) == (dtype, torch.device("cpu"))
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, tokenizer.state_dict()[name].bfloat16().to(dtype))


def test_models_go_to_the_hub_and_come_from_it(tokenizer, folder, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, name, exist_ok):
            assert exist_ok

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), options))
            return "url"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert tokenizer.push_to_hub("a/b", token="secret", revision="main") == "url"
    assert calls == ["secret", ("a/b", ["config.json", "model.safetensors"], {"revision": "main"})]
    downloads = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: downloads.append((a, k)) or str(folder))
    assert ChannelTokenizer.from_pretrained("a/b", revision="main").config == tokenizer.config
    assert downloads == [(("a/b",), {"revision": "main"})]


@pytest.mark.parametrize("left", [0, 100, -1, None])
def test_truncated_or_missing_weights_are_refused(folder, left):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if left is not None:
        weights.write_bytes(content[:left])
    assert str(weights) in refusal(ChannelTokenizer.from_pretrained, folder)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, ["'llama'", "'channeltok'"]),
        ({"num_bits": 8.0}, ["num_bits is 8.0"]),
        ({"linear_paths": 1}, ["linear_paths is 1"]),
        ({"encoder_widths": [32, "32"]}, ["encoder_widths is '32'"]),
        ({"nmu_bits": 8}, ["config.json", "unknown key 'nmu_bits'; did you mean num_bits"]),
        ({"num_channels": 4}, ["weights do not fit config.json", "decoder.trunk.0.weight"]),
    ],
)
def test_a_config_file_of_another_model_is_refused(folder, changes, named):
    edit_config(folder, **changes)
    message = refusal(ChannelTokenizer.from_pretrained, folder)
    assert all(part in message for part in named)


@pytest.mark.parametrize("content", ["{", "[1]", "", None])
def test_a_damaged_or_missing_config_file_is_refused(folder, content):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert str(folder / "config.json") in refusal(ChannelTokenizer.from_pretrained, folder)


def test_a_missing_or_unknown_weight_and_a_missing_folder_are_refused(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    added = state | {"encoder.trunk.99.bias": torch.zeros(1)}
    del state["encoder.trunk.0.bias"]
    for wrong, name in ((added, "encoder.trunk.99.bias"), (state, "encoder.trunk.0.bias")):
        save_file(wrong, folder / "model.safetensors")
        assert name in refusal(ChannelTokenizer.from_pretrained, folder)
    assert str(tmp_path / "nothing") in refusal(ChannelTokenizer.from_pretrained, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("image_size", 64),
        ("latent_size", 3),
        ("num_bits", 17),
        ("patch_size", 3),
        ("num_heads", 3),
        ("encoder_widths", [32]),
        ("encoder_widths", [32, 33]),
        ("encoder_widths", [32] * 6),
        ("decoder_widths", []),
        ("decoder_widths", [32, 32]),
    ],
)
def test_a_bad_value_in_the_configuration_is_named(field, value):
    assert field in refusal(TokenizerConfig, **TINY | {field: value})


@pytest.fixture(scope="module")
def published():
    return load_file(GOLDEN / "tiny_proj.state.safetensors")


def import_published(state, folder, **settings):
    save_file(state, folder / "published.safetensors")
    return ChannelTokenizer.from_published(folder / "published.safetensors", PUBLISHED, **settings)


def test_published_weights_that_do_not_fit_are_refused(published, tmp_path):
    def message(state, **settings):
        return refusal(import_published, state, tmp_path, **settings)

    without = {name: value for name, value in published.items() if name != "decoder.model.0.bias"}
    assert "decoder.trunk.0.bias" in message(without)
    for name in ("decoder.model.99.bias", "discriminator.weight"):
        message(published | {name: torch.zeros(1)})
    twin = published["encoder.model.20.gn.weight"] + 1
    assert "both mean" in message(published | {"encoder.model.20.weight": twin})
    misshapen = message(published | {"decoder.model.0.bias": torch.zeros(3)})
    assert "[3]" in misshapen and "[64]" in misshapen
    assert "quantizer.mask" in message(published | {"quantizer.mask": published["quantizer.mask"].flip(0)})
    assert "'module.'" in message(published, prefix="module.")
    message({f"model.{name}": value for name, value in published.items()})


@pytest.mark.parametrize("prefix", ["", "model._orig_mod."])
def test_published_weights_in_a_pt_file_under_any_prefix(published, tmp_path, prefix):
    path = tmp_path / "last.pt"
    torch.save({"state_dict": {prefix + name: value for name, value in published.items()}, "epoch": 3}, path)
    model = ChannelTokenizer.from_published(path, PUBLISHED, prefix=prefix, state_key="state_dict")
    assert torch.equal(model.encoder.trunk[0].weight, published["encoder.model.0.weight"])
    assert torch.equal(model.decoder.trunk[-1].bias, published["decoder.model.26.bias"])
    assert not model.training
    assert "'ema'" in refusal(ChannelTokenizer.from_published, path, PUBLISHED, prefix=prefix, state_key="ema")
    assert "state_dict" in refusal(ChannelTokenizer.from_published, path, PUBLISHED, prefix=prefix)
