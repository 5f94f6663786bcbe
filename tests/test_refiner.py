"""The refiner: its flow against closed forms, its laws in a pipeline, its training, and wrong calls."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, REPO, ScriptRunner
from measurement import classes_of, measure, rows, words
from oracles import pictures as oracle
from torch import Tensor

from common.bit_prior import token_bits
from common.checkpoint import fingerprint, load_tensors
from common.config import InputError, Refinement
from common.images import load_image, to_float
from generator.pipeline import ChannelTokPipeline
from refiner.config import RefinerConfig
from refiner.flow import ImageRefiner
from refiner.model import Refiner
from refiner.training import continue_some, draw_flips, draw_lengths
from tokenizer import ChannelTokenizer, PictureDecoder
from training.schedule import Part

C, SIZE = 16, 32


def tiny_refiner(tokenizer_fingerprint: str, **changes: Any) -> Refiner:
    """Of the tiny tokenizer; weights that change every image."""
    fields: dict[str, Any] = {
        "layers": 1, "heads": 2, "width": 16, "patch_size": 8, "image_size": SIZE, "num_channels": C,
        "class_names": CLASS_NAMES, "tokenizer_fingerprint": tokenizer_fingerprint, "scale_lengths": [1, C],
        "scales": [0.5, 0.25], "has_null_label": True,
    }  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        refiner = Refiner(RefinerConfig(**(fields | changes)))
        for parameter in refiner.parameters():
            parameter.normal_(std=0.2)
    return refiner.eval()


@pytest.fixture(scope="module")
def model_folder(
    pipeline_folder: Path, tiny_tokenizer: ChannelTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model, with a refiner."""
    folder = tmp_path_factory.mktemp("refined") / "model"
    shutil.copytree(pipeline_folder, folder)
    tiny_refiner(fingerprint(tiny_tokenizer)).save_pretrained(folder / "refiner")
    return folder


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> ChannelTokPipeline:
    return ChannelTokPipeline.from_pretrained(model_folder, "cpu")


def pixels(images: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


# ------------------------------------------------------------------------------------------ laws


def test_a_refined_image_depends_on_seed_class_tokens_and_k_alone(pipeline: ChannelTokPipeline) -> None:
    refinement = Refinement(3, cfg_scale=2.0)
    options: dict[str, Any] = {"refine": refinement}
    batch = pipeline([3, 1, 0], 9, seed=[40, 41, 9], **options)
    alone = pipeline([1], 9, seed=41, **options)
    assert np.abs(pixels(batch.images)[1] - pixels(alone.images)[0]).max() <= 1
    # the first 9 tokens of a longer drawing; and stopped, saved and continued
    steps = {step.num_tokens: step.preview(refine=refinement) for step in pipeline.stream([1], seed=41, **options)}
    assert np.abs(pixels(steps[9])[0] - pixels(alone.images)[0]).max() <= 1
    continued = pipeline([1], 9, seed=41, prefix=batch.tokens[1:2, :4], **options)
    assert np.abs(pixels(continued.images) - pixels(alone.images)).max() <= 1
    # it is refined by default, and each of seed, class, k, steps and guidance matters
    assert np.abs(pixels(pipeline([1], 9, 41).images) - pixels(pipeline([1], 9, 41, refine=0).images)).mean() > 2
    base = {"labels": [1], "seeds": [41], "k": 9, "refine": refinement}
    changes: list[dict[str, Any]] = [{"labels": [2]}, {"seeds": [42]}, {"k": 8}]
    changes += [
        {"refine": replace(refinement, **field)} for field in ({"steps": 1}, {"cfg_scale": 1.0}, {"temperature": 0.5})
    ]
    for change in ({}, *changes):
        use = base | change
        images = pipeline.images(use["labels"], use["seeds"])
        pending = images.start(batch.tokens[1:2], torch.tensor([use["k"]]), use["refine"])
        found = pending.images().int().permute(0, 2, 3, 1).numpy()
        difference = np.abs(found - pixels(alone.images)).mean()
        assert (difference > 0.05) == bool(change), change


def test_refinement_changes_no_token_and_counts_for_the_deadline(
    pipeline: ChannelTokPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined, plain = pipeline([2, 4], seed=3), pipeline([2, 4], seed=3, refine=0)
    assert torch.equal(refined.tokens, plain.tokens)
    assert pipeline.refiner is not None
    monkeypatch.setattr(pipeline.refiner, "seconds", lambda batch_size, refinement: 1000.0)
    assert pipeline([2], seed=3, deadline=900.0).lengths == (1,)
    assert pipeline([2], seed=3, deadline=900.0, refine=0).lengths == (C,)


def test_a_saved_refiner_is_the_same_and_refines_large_batches_in_parts(
    model_folder: Path, tiny_tokenizer: ChannelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = tiny_refiner(fingerprint(tiny_tokenizer)), Refiner.from_pretrained(model_folder / "refiner")
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    images = ImageRefiner(found, dtype=torch.float32)
    arguments = torch.randint(256, (5, 3, SIZE, SIZE), dtype=torch.uint8), [1, 4, 16, 2, 2], [0, 1, 2, 3, 4], range(5)
    whole, run, sizes = images(*arguments, Refinement(2)), images._run, []

    monkeypatch.setattr(
        images, "_run", lambda inputs, refinement: sizes.append(len(inputs[0])) or run(inputs, refinement)
    )
    images._at_once = 2
    assert (images(*arguments, Refinement(2)).int() - whole.int()).abs().max() <= 1
    assert sizes == [2, 2, 1]


def test_refining_loads_no_compiler(model_folder: Path) -> None:
    code = "import sys; from generator.pipeline import ChannelTokPipeline as P; P.from_pretrained(sys.argv[1], 'cpu')"
    code += "([0], 2); print([name for name in ('torch._dynamo', 'sympy', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(model_folder)], capture_output=True, text=True, cwd=REPO)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_integration_is_the_direct_one() -> None:
    images = torch.randint(256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    arguments = images, [1, 4, 16], [0, 1, 5], [7, 8, 9], Refinement(3, 1.5)
    refiner = tiny_refiner("x")
    for parameter in refiner.parameters():
        parameter.data /= 4  # large weights enlarge the rounding of TF32
    direct = ImageRefiner(refiner, dtype=torch.float32)(*arguments).int()
    assert (direct - images).abs().float().mean() > 5
    captured = ImageRefiner(refiner.to("cuda"), dtype=torch.float32)
    for _ in range(2):
        assert (captured(*arguments).cpu().int() - direct).abs().max() <= 2


# ------------------------------------------------------------------------------------------ training


def test_tokens_have_the_errors_of_a_generator() -> None:
    count, generated = 400, 63
    shares_kept: list[float] = []

    def continue_tokens(
        tokens: Tensor, kept: list[int], wanted: list[int], labels: list[int], seeds: list[int]
    ) -> Tensor:
        assert len(set(seeds)) == len(tokens) == len(labels)
        drawn = torch.full((len(tokens), max(wanted)), generated)
        for row, (given, length) in enumerate(zip(kept, wanted, strict=True)):
            assert 1 <= given < length
            shares_kept.append(math.log(given) / math.log(length))
            drawn[row, :given] = tokens[row, :given]
        return drawn

    part = Part(seed=0, step=3, rows=range(0, 2 * count, 2), batch_size=2 * count)
    lengths, labels = draw_lengths(part, C), torch.zeros(count, dtype=torch.long)
    assert (lengths == 1).float().mean().item() == pytest.approx(math.log(2) / math.log(C + 1), abs=0.07)
    shares = token_bits(draw_flips(part, C, 6, 0.2), 6).add(1).div(2).mean((1, 2))
    assert shares.mean().item() == pytest.approx(0.1, abs=0.01)
    assert shares.std() > 0.04, "each image has a probability of its own"
    clean = torch.zeros(count, C, dtype=torch.long)
    found = continue_some(clean, lengths, labels, part, 0.5, continue_tokens) == generated
    assert not found[:, 0].any()
    assert min(shares_kept) == 0, "a single token may be kept"
    assert 0.2 < sum(shares_kept) / len(shares_kept) < 0.4, "log-uniform, rounded down"
    assert found.any(1)[lengths > 4].float().mean().item() == pytest.approx(0.5, abs=0.12)


# ------------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def trained(
    scripts: ScriptRunner, image_folder: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A function that runs train_refiner.py, writing to a folder, and returns what it left."""

    def run(folder: Path, *flags: Any) -> Any:
        common = (
            "--tokenizer", pipeline_folder / "tokenizer", "--data-dir", image_folder, "--output-dir", folder,
            "--layers", 1, "--heads", 2, "--width", 16, "--batch-size", 4, "--num-workers", 0,
            "--mixed-precision", "no", "--learning-rate", 3e-3, "--warmup-steps", 0, "--checkpoint-every", 2,
            "--schedule", "constant",
        )  # fmt: skip
        return scripts("train_refiner.py", *common, *flags)

    return run


def test_a_resumed_run_equals_an_uninterrupted_one(trained: Any, pipeline_folder: Path, tmp_path: Path) -> None:
    errors = "--generator", pipeline_folder, "--continued-share", 0.7, "--bit-flips", 0.2
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = trained(whole, "--steps", 4, *errors)
    assert done.code == 0, done.err
    assert trained(parts, "--steps", 2, *errors).code == 0
    done = trained(parts, "--steps", 4, "--resume", *errors)
    assert done.code == 0, done.err
    first, second = (load_tensors(folder / "refiner" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert (whole / "refined" / "step-00000004.png").exists()


def test_sample_py_refines_with_the_refiner_of_the_model(
    trained: Any, scripts: ScriptRunner, model_folder: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert trained(run, "--steps", 1).code == 0
    # three classes of folders are not the five of the model
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    shutil.copytree(run / "refiner", folder / "refiner")
    done = scripts("sample.py", "--model", folder, "--class-labels", 1, "--output-dir", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "class_names of the refiner differs" in done.err
    flags = ("--model", model_folder, "--class-labels", 1, 2, "--num-tokens", 8, "--previews", 4)
    for name, more in (("a", ()), ("b", ("--refine", 0)), ("c", ("--refine", 2, "--refine-previews"))):
        done = scripts("sample.py", *flags, "--output-dir", tmp_path / name, *more)
        assert done.code == 0, done.err
    for path, different in (("00000.png", 3), ("previews/00001_k0004.png", 2), ("tokens.npz", 1)):
        assert len({(tmp_path / name / path).read_bytes() for name in "abc"}) == different, path


def test_fid_measures_decoded_and_refined_images_of_the_same_tokens(
    scripts: ScriptRunner, model_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    flags = words(model_folder, photographs, classifier, tmp_path / "both")
    assert measure(scripts, *flags, "--num-samples", 10, "--refine", 2, "--save-npz").code == 0
    flags = words(model_folder, photographs, classifier, tmp_path / "plain")
    assert measure(scripts, *flags, "--num-samples", 10, "--refine", 0).code == 0
    found = rows(tmp_path / "both")
    assert [(row["num_tokens"], row["refined"]) for row in found] == [(k, r) for r in (False, True) for k in (2, 7, 16)]
    assert found[:3] == rows(tmp_path / "plain")
    pipe = ChannelTokPipeline.from_pretrained(model_folder, "cpu")
    expected = [pipe([label], 7, seed=i, refine=2).images[0] for i, label in enumerate(classes_of(10))]
    with np.load(tmp_path / "both" / "samples-k0007-refined.npz") as archive:
        assert np.abs(archive["arr_0"].astype(int) - pixels(expected)).max() <= 1
    done = measure(scripts, *flags, "--num-samples", 10, "--refine", 2)
    assert done.code == 2
    assert "measured with refinement = None" in done.err


def test_reconstruction_measures_refined_images(
    scripts: ScriptRunner, image_folder: Path, tiny_tokenizer: ChannelTokenizer, classifier: Path, tmp_path: Path
) -> None:
    known = fingerprint(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny_refiner(known, class_names=["a", "b", "c"]).save_pretrained(tmp_path / "refiner")
    flags = ("reconstruction", "--tokenizer", tmp_path / "tokenizer", "--data-dir", image_folder, "--device", "cpu")
    flags = (*flags, "--num-workers", 0, "--perceptual", "none", "--inception", "none", "--features", classifier)
    flags = (*flags, "--num-tokens", 2, 9, "--refiner", tmp_path / "refiner", "--refine", 2)
    done = scripts("benchmark.py", *flags, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["num_tokens"], row["refined"]) for row in found] == [(2, False), (9, False), (2, True), (9, True)]
    paths = sorted((image_folder / "val").rglob("*.*"))
    images = torch.stack([load_image(path, SIZE) for path in paths])
    decoded = PictureDecoder(tiny_tokenizer, dtype=torch.float32)(tiny_tokenizer.tokenize(to_float(images))[:, :9])
    refiner = ImageRefiner(tiny_refiner(known, class_names=["a", "b", "c"]))
    refined = refiner(decoded, [9] * 6, [0, 0, 1, 1, 2, 2], range(6), refiner.refinement(2))
    expected = [oracle.psnr(a.numpy(), b.numpy()) for a, b in zip(refined, images, strict=True)]
    assert found[3]["psnr"] == pytest.approx(float(np.mean(expected)), abs=0.02)
    assert found[3]["feature_distance"] != found[1]["feature_distance"]
    assert "invented" in (tmp_path / "out" / "results.md").read_text()
    tiny_refiner("0" * 16, class_names=["a", "b", "c"]).save_pretrained(tmp_path / "refiner")
    done = scripts("benchmark.py", *flags, "--output-dir", tmp_path / "out")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--refine", -1), "refine is -1"),
        (("--refine-cfg-scale", -2), "refine_cfg_scale is -2"),
        (("--refine-temperature", 3), "refine_temperature is 3"),
        (("--refine", 0, "--refine-cfg-scale", 2), "images are not refined"),
        (("--refine", 0, "--refine-previews"), "images are not refined"),
    ],
)
def test_wrong_flags_are_one_line(
    scripts: ScriptRunner, model_folder: Path, tmp_path: Path, flags: tuple[Any, ...], line: str
) -> None:
    done = scripts("sample.py", "--model", model_folder, "--output-dir", tmp_path / "out", *flags)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert line in done.err
    assert not (tmp_path / "out").exists()


def test_refiners_that_do_not_fit_are_refused(
    pipeline_folder: Path, tiny_tokenizer: ChannelTokenizer, trained: Any, tmp_path: Path
) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    known = fingerprint(tiny_tokenizer)
    for changes, named in (
        ({"tokenizer_fingerprint": "0" * 16}, "tokenizer_fingerprint"),
        ({"image_size": 64}, "image_size"),
        ({"class_names": ["hen"]}, "class_names"),
    ):
        fields = {"tokenizer_fingerprint": known} | changes
        tiny_refiner(**fields).save_pretrained(tmp_path / "model" / "refiner")
        with pytest.raises(InputError, match=named):
            ChannelTokPipeline.from_pretrained(tmp_path / "model", "cpu")
    without_null = tiny_refiner(known, has_null_label=False)
    with pytest.raises(InputError, match="without null label"):
        ImageRefiner(without_null)(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), [1], [0], [0], Refinement(1, 2.0))
    plain = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    with pytest.raises(InputError, match="no refiner"):
        plain([1], 2, refine=4)
    for flags, named in ((("--patch-size", 6), "patch_size 6"), (("--tokenizer", tmp_path / "none"), "no folder")):
        done = trained(tmp_path / "run", *flags)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert named in done.err
