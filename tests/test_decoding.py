import copy
from pathlib import Path

import pytest
import torch

from common.config import InputError
from common.images import to_uint8
from common.runtime import has_fast_bfloat16, move
from tokenizer import ChannelTokenizer, PictureDecoder, TokenizerConfig

DEMO = Path(__file__).resolve().parents[1] / "weights" / "demo" / "tokenizer"


def random_tokens(tokenizer, count, seed=0):
    config = tokenizer.config
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (count, config.num_channels), generator=rng)


def plain(tokenizer, tokens, num_tokens=None):
    return to_uint8(tokenizer.detokenize(tokens.to(tokenizer.device), num_tokens)).cpu()


def levels(images, others):
    """Grey levels between two uint8 pictures, each value's own."""
    return (images.cpu().int() - others.cpu().int()).abs()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    """The tiny one with its last layer scaled up, so that pictures use all grey levels."""
    model = copy.deepcopy(tiny_tokenizer)
    with torch.no_grad():
        model.decoder.trunk[-1].weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def large_maps():
    """64 x 64 pixels without patches: its decoder has maps of 32 and 64."""
    config = TokenizerConfig(
        image_size=64, num_channels=16, encoder_widths=[32] * 5, decoder_widths=[64, 96, 64], num_bits=8, num_heads=4
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = ChannelTokenizer(config).eval()
        model.decoder.trunk[-1].weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def demo():
    return ChannelTokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize(("name", "k"), [("tokenizer", 1), ("tokenizer", 16), ("large_maps", 7), ("demo", 16)])
def test_pictures_are_those_of_the_tokenizer(request, name, k):
    model = request.getfixturevalue(name)
    tokens = random_tokens(model, 3)[:, :k]
    images = PictureDecoder(model, dtype=torch.float32)(tokens)
    assert images.dtype == torch.uint8
    expected = plain(model, tokens)
    assert expected.float().std() > 10
    assert levels(images, expected).max() <= 1
    # other sums, so a value may fall to the other side of a rounding boundary, but rarely
    assert (images != expected).float().mean() < 0.002


def test_rows_of_own_lengths_are_decoded_in_parts(tokenizer, monkeypatch):
    monkeypatch.setattr("tokenizer.decoding.PIXELS_AT_ONCE", 2 * 32 * 32)
    decoder = PictureDecoder(tokenizer, dtype=torch.float32)
    tokens, lengths = random_tokens(tokenizer, 5), torch.tensor([16, 2, 9, 1, 4])
    sizes, decode = [], decoder._decode
    monkeypatch.setattr(decoder, "_decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    images = decoder(tokens, lengths)
    assert sizes == [2, 2, 1]
    assert levels(images, plain(tokenizer, tokens, lengths)).max() <= 1
    for row, length in enumerate(lengths):
        assert levels(images[row], plain(tokenizer, tokens[row : row + 1, :length])[0]).max() <= 1


@pytest.mark.parametrize("num_tokens", [None, [3, 16]])
def test_pending_pictures_are_a_snapshot_and_decoded_once_when_asked_for(tokenizer, num_tokens, monkeypatch):
    decoder, tokens = PictureDecoder(tokenizer, dtype=torch.float32), random_tokens(tokenizer, 2)
    calls = []
    monkeypatch.setattr(decoder, "_decode", lambda latents: calls.append(len(latents)) or tokenizer.decode(latents))
    lengths = None if num_tokens is None else torch.tensor(num_tokens)
    expected = plain(tokenizer, tokens, lengths)
    pending = decoder.start(tokens, lengths)
    tokens.zero_()
    if lengths is not None:
        lengths.fill_(1)
    assert calls == ([] if decoder.device.type != "cuda" else [2])
    images = pending.images()
    assert images.device.type == "cpu"
    assert levels(images, expected).max() <= 1
    assert pending.images() is images
    assert calls == [2]


def test_tokens_that_cannot_be_decoded_are_refused_at_once(tokenizer):
    for action in (PictureDecoder(tokenizer), PictureDecoder(tokenizer).start):
        with pytest.raises(InputError):
            action(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([1, 5]))


@pytest.mark.parametrize(("name", "dtype"), [("large_maps", torch.float32), ("tokenizer", torch.bfloat16)])
def test_the_tokenizer_is_not_changed(request, name, dtype):
    model = request.getfixturevalue(name)
    state = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    PictureDecoder(model, dtype=dtype)(random_tokens(model, 1))
    for key, value in model.state_dict().items():
        assert (value.dtype, value.stride()) == (torch.float32, state[key][1])
        assert torch.equal(value, state[key][0])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_decoder_is_compiled_only_where_there_is_a_compiler(tokenizer, monkeypatch):
    decoder = PictureDecoder(tokenizer, compile=True)
    assert isinstance(decoder._decode, torch._dynamo.OptimizedModule)
    monkeypatch.setattr("shutil.which", lambda name: None)
    if tokenizer.device.type == "cpu":
        with pytest.raises(InputError, match="compiler"):
            PictureDecoder(tokenizer, compile=True)


def test_bfloat16_is_the_default_of_fast_hardware_and_within_a_grey_level_on_average(demo):
    assert (PictureDecoder(demo).dtype == torch.bfloat16) == has_fast_bfloat16(demo.device)
    pixels = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = demo.tokenize(torch.nn.functional.interpolate(pixels, size=64, mode="bicubic").clamp(-1, 1))
    decoder = PictureDecoder(demo, dtype=torch.bfloat16)
    for k in (4, 64):
        difference = levels(decoder(tokens[:, :k]), plain(demo, tokens[:, :k])).float()
        assert 0 < difference.mean() < 1


def test_seconds_are_measured_once_for_each_batch_size_after_a_warm_up(tokenizer, monkeypatch):
    decoder = PictureDecoder(tokenizer, dtype=torch.float32)
    calls = []
    monkeypatch.setattr(decoder, "_decode", lambda latents: calls.append(len(latents)) or tokenizer.decode(latents))
    seconds = decoder.seconds(2)
    assert 0 < seconds < 10
    assert decoder.seconds(2) == seconds
    decoder.seconds(1)
    assert calls == [2] * 4 + [1] * 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_decoded_beside_other_work_on_cuda(large_maps, dtype):
    model = move(copy.deepcopy(large_maps), torch.device("cuda"))
    decoder = PictureDecoder(model, dtype=dtype)
    tokens = [random_tokens(model, 8, seed).to(model.device) for seed in range(6)]
    expected = [decoder(entry).cpu() for entry in tokens]
    tolerance = 1 if dtype == torch.float32 else 4  # its last layer amplifies rounding; 2.3 on a CPU, too
    for entry, reference in zip(tokens, expected, strict=True):
        assert levels(reference, plain(model, entry)).float().mean() < tolerance
    decoder.start(tokens[0]).images()
    busy = torch.randn(4096, 4096, device=model.device)
    pending = []
    for entry in tokens:
        busy = (busy @ busy).clamp(-1, 1)  # work of the current stream before and after each
        pending.append(decoder.start(entry))
        entry.zero_()
        torch.zeros_like(entry).fill_(1)  # allocates memory that start() must not have released
        busy = (busy @ busy).clamp(-1, 1)
    for entry, reference in zip(pending, expected, strict=True):
        images = entry.images()
        assert images.is_pinned()
        assert levels(images, reference).max() <= 1
    ragged = torch.tensor([1, 16, 3, 9, 2, 4, 8, 5])
    images = decoder.start(random_tokens(model, 8), ragged).images()
    assert levels(images, decoder(random_tokens(model, 8), ragged)).max() <= 1
