"""The stream: laws 3 to 7 of the design, each for k = 1, k = 16 = C and values between."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sharp_generator
from hypothesis import settings

from common.config import InputError
from generator.config import SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import ChannelGPT
from generator.token_file import TokenFile

C, CODES = 16, 64
PLAIN = SamplingConfig()
GUIDED = SamplingConfig(cfg_scale=2.5)
FILTERED = SamplingConfig(temperature=1.3, top_k=30, top_p=0.95)
EVERYTHING = SamplingConfig(temperature=0.9, top_k=20, top_p=0.9, cfg_scale=1.7)
ALL = [PLAIN, GUIDED, FILTERED, EVERYTHING]
LABELS, SEEDS = [0, 4, 2, 5, 2], [10, 11, 0, 2**62, 11]  # 5 is the null label
FEW = settings(max_examples=8, deadline=None, derandomize=True)


def final(
    engine: Engine,
    labels: Sequence[int],
    seeds: Sequence[int],
    num_tokens: int = C,
    sampling: SamplingConfig = PLAIN,
    prefix: torch.Tensor | None = None,
) -> list[list[int]]:
    *_, last = stream(engine, labels, seeds, num_tokens, sampling, prefix)
    return last.tokens.tolist()


# ------------------------------------------------------------------------------------- law 3: prefix


@pytest.mark.parametrize("sampling", ALL, ids=["plain", "guided", "filtered", "everything"])
def test_drawing_k_gives_the_first_k_of_drawing_all(tiny_engine: Engine, sampling: SamplingConfig) -> None:
    steps = list(stream(tiny_engine, LABELS, SEEDS, C, sampling))
    whole = steps[-1].tokens.tolist()
    assert [step.num_tokens for step in steps] == list(range(1, C + 1))
    for step in steps:
        assert step.tokens.shape == (5, step.num_tokens)
        assert step.tokens.dtype == torch.int64
        assert step.tokens.tolist() == [row[: step.num_tokens] for row in whole]
    for k in (1, 2, 7, C):
        assert final(tiny_engine, LABELS, SEEDS, k, sampling) == [row[:k] for row in whole]


# ------------------------------------------------------------------------------------- law 4: independence


def test_token_differences_between_batch_sizes_are_rare(tiny_engine: Engine) -> None:
    """Sums differ in their last bits with the batch size; how often a token does, over 20,480 tokens each."""
    labels, seeds = [i % 5 for i in range(1280)], list(range(1280))
    whole = torch.tensor(final(tiny_engine, labels, seeds))
    for size, count in ((128, 1280), (10, 1280), (1, 64)):
        parts = [final(tiny_engine, labels[i : i + size], seeds[i : i + size]) for i in range(0, count, size)]
        found = torch.tensor([row for part in parts for row in part])
        # after its first different token an image is another image, so only that one counts
        different = int((found != whole[:count]).any(-1).sum())
        assert different / (count * C) < 1e-3


# ------------------------------------------------------------------------------------- law 6: stop and continue


@pytest.mark.parametrize("k", [1, 15])
def test_stopped_saved_loaded_and_continued_is_one_run(tiny_engine: Engine, tmp_path: Path, k: int) -> None:
    sampling = EVERYTHING
    running = stream(tiny_engine, LABELS, SEEDS, C, sampling)
    for _ in range(k):
        stopped = next(running)
    drawing = TokenFile(
        tokens=stopped.tokens, num_tokens=torch.full((5,), k), class_labels=LABELS, seeds=SEEDS, sampling=sampling,
        fingerprint="0123-4567",
    )  # fmt: skip
    drawing.save(tmp_path / "tokens.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]
    loaded = TokenFile.load(tmp_path / "tokens.npz")
    assert torch.equal(loaded.tokens, drawing.tokens)
    assert loaded.num_tokens.tolist() == [k] * 5
    for name in ("class_labels", "seeds", "sampling", "fingerprint"):
        assert getattr(loaded, name) == getattr(drawing, name)
    steps = list(stream(tiny_engine, loaded.class_labels, loaded.seeds, C, loaded.sampling, loaded.tokens))
    assert [step.num_tokens for step in steps] == list(range(k + 1, C + 1))
    assert steps[-1].tokens.tolist() == final(tiny_engine, LABELS, SEEDS, C, sampling)
    # also in two pieces, the second one for a part of the images
    middle = stream(tiny_engine, LABELS[:2], SEEDS[:2], k + 1, sampling, loaded.tokens[:2])
    assert next(middle).tokens.tolist() == steps[0].tokens[:2].tolist()


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "plain array", "other names"])
def test_a_damaged_drawing_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tokens.npz"
    if damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("hello\nthere\n")
    elif damage == "cut":
        np.savez(path, tokens=np.zeros((2, 3), np.uint16))
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "plain array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "other names":
        np.savez(path, codes=np.zeros((2, 3), np.uint16))
    with pytest.raises(InputError, match=r"tokens\.npz") as caught:
        TokenFile.load(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- guidance and costs


def test_cfg_scale_one_is_conditional_and_zero_unconditional(tiny_engine: Engine) -> None:
    """Scale 1 has no separate formula: scales close to it give the same tokens; tests/test_anytime.py has its odds."""
    plain = final(tiny_engine, range(5), [6] * 5)
    assert final(tiny_engine, range(5), [6] * 5, C, SamplingConfig(cfg_scale=1 + 1e-9)) == plain
    assert final(tiny_engine, range(5), [6] * 5, C, GUIDED) != plain
    null = final(tiny_engine, [5, 5], SEEDS[:2])
    assert final(tiny_engine, [0, 3], SEEDS[:2], C, SamplingConfig(cfg_scale=0)) == null


def test_a_token_costs_one_step_with_twice_the_rows_for_guidance(
    tiny_engine: Engine, watch_steps: Callable[[Engine], list[tuple[int, int, bool]]]
) -> None:
    steps = watch_steps(tiny_engine)
    for sampling, rows in ((PLAIN, 5), (GUIDED, 10)):
        running = stream(tiny_engine, LABELS, SEEDS, C, sampling)
        assert steps == []  # nothing is computed before the first step is requested
        for count in range(1, C + 1):
            next(running)
            assert steps == [(rows, position, True) for position in range(count)]
        steps.clear()


@pytest.mark.parametrize("sampling", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_the_loop_never_waits_for_the_device(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch, sampling: SamplingConfig
) -> None:
    expected = final(tiny_engine, LABELS, SEEDS, C, sampling)

    def refuse(self: torch.Tensor, *arguments: object) -> None:
        raise AssertionError("a tensor's value was read on the host")

    running = stream(tiny_engine, LABELS, SEEDS, C, sampling)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        with pytest.raises(AssertionError, match="host"):
            bool(torch.ones(()))
        *_, last = running
    assert last.tokens.tolist() == expected


# ------------------------------------------------------------------------------------- bad arguments


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)


BAD: list[tuple[str, dict[str, object], str]] = [
    ("no labels", {"class_labels": [], "seeds": []}, "class_labels"),
    ("label below", {"class_labels": [0, -1]}, "-1"),
    ("label above", {"class_labels": [0, 6]}, "6"),
    ("few seeds", {"seeds": [1]}, "seeds"),
    ("seed below", {"seeds": [0, -1]}, "-1"),
    ("seed above", {"seeds": [0, 2**63]}, str(2**63)),
    ("k = 0", {"num_tokens": 0}, "num_tokens"),
    ("k above", {"num_tokens": 17}, "17"),
    ("few k", {"num_tokens": [4]}, "num_tokens"),
    ("one k above", {"num_tokens": [4, 17]}, "17"),
    ("prefix of no tokens", {"prefix": zeros(2, 0)}, "prefix"),
    ("prefix of k", {"num_tokens": 4, "prefix": zeros(2, 4)}, "prefix"),
    ("prefix beyond one k", {"num_tokens": [5, 6], "prefix": zeros(2, 5)}, "prefix"),
    ("prefix of other images", {"prefix": zeros(3, 4)}, "prefix"),
    ("flat prefix", {"prefix": zeros(2)}, "prefix"),
    ("prefix above the codes", {"prefix": torch.full((2, 4), 64)}, "prefix"),
    ("negative prefix", {"prefix": torch.full((2, 4), -1)}, "prefix"),
    ("few prefix lengths", {"prefix": zeros(2, 3), "prefix_lengths": [3]}, "prefix"),
    ("prefix length 0", {"prefix": zeros(2, 3), "prefix_lengths": [0, 3]}, "prefix"),
]


@pytest.mark.parametrize(("change", "named"), [entry[1:] for entry in BAD], ids=[entry[0] for entry in BAD])
def test_bad_arguments_are_refused_at_the_call(tiny_engine: Engine, change: dict[str, object], named: str) -> None:
    arguments = {"class_labels": [0, 1], "seeds": [0, 1], "num_tokens": C, "sampling": PLAIN} | change
    with pytest.raises(InputError) as caught:
        stream(tiny_engine, **arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("label", "sampling"), [(0, GUIDED), (5, PLAIN)], ids=["guidance", "the null label itself"])
def test_a_model_without_null_label_refuses_what_needs_it(
    tiny_generator: ChannelGPT, label: int, sampling: SamplingConfig
) -> None:
    model = sharp_generator(replace(tiny_generator.config, has_null_label=False))
    engine = Engine(CachedDecoder.from_model(model))
    assert len(final(engine, [0], [0])[0]) == C
    with pytest.raises(InputError, match=r"null label|no class") as caught:
        stream(engine, [label], [0], C, sampling)
    assert "\n" not in str(caught.value)
