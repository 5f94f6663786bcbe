"""Wrong calls and hostile files: each is refused with one line, and no input or earlier result is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from safetensors.torch import load, save
from test_configs import COMMANDS

from common import cli
from common.config import InputError
from common.files import exclusive_folder, load_arrays
from generator.config import SamplingConfig
from generator.model import ChannelGPT
from generator.pipeline import ChannelTokPipeline
from generator.settings import ModelSettings
from generator.token_file import TokenFile
from generator.tokens import TokenStore
from tokenizer import ChannelTokenizer
from tokenizer.sources import FolderSource

# ------------------------------------------------------------------------------------- wrong calls

NUMBERS = ["", "x", "-1", "1.5", "nan", "1e309", "9" * 30]


def wrong_calls() -> Iterator[tuple[str, list[str]]]:
    """Every flag of every command with values that most flags do not take, beside the flags that are required."""
    for command, kinds in COMMANDS.items():
        entries = [(kind, field) for kind in kinds for field in fields(kind)]
        missing = [field for _, field in entries if field.default is MISSING and field.default_factory is MISSING]
        required = [f"--{field.name}=given-{field.name}" for field in missing]
        for kind, field in entries:
            hint = get_type_hints(kind)[field.name]
            is_text = str in (hint, *get_args(hint)) and get_origin(hint) is not Literal
            for value in ["", "\0", "é" * 300] if is_text else NUMBERS:
                yield command, [*required, f"--{field.name}={value}"]


def test_wrong_calls_are_refused_with_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    calls, refused = list(wrong_calls()), 0
    for command, words in calls:
        try:
            cli.parse(*COMMANDS[command], argv=words)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error), words
    assert len(calls) >= 1000
    assert refused >= 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{0}/../in", "link", "./{1}"])
def test_an_output_folder_that_is_an_input_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spelling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    output = spelling.format(tmp_path / "in", "in")
    for command, flag, more in (
        ("train_ar.py", "--tokens", []),
        ("train_ar.py", "--init-from", ["--tokens", "t"]),
        ("train_tokenizer.py", "--data-dir", []),
        ("train_refiner.py", "--tokenizer", ["--data-dir", "d"]),
        ("extract_tokens.py", "--tokenizer", ["--data-dir", "d"]),
        ("sample.py", "--model", []),
        ("benchmark.py reconstruction", "--tokenizer", ["--data-dir", "d"]),
    ):
        kinds = [kind for kind in COMMANDS[command] if kind.__name__ != "VerificationConfig"]
        with pytest.raises(InputError, match=r"is also .*; choose another folder"):
            cli.parse(*kinds, argv=[flag, "in", "--output-dir", output, *more])


# ------------------------------------------------------------------------------------- hostile files


def damaged_bytes(content: bytes) -> Iterator[bytes]:
    """A file cut short, with wrong bytes, with more bytes, or of another kind."""
    yield from (content[: len(content) * part // 8] for part in range(8))
    rng = np.random.default_rng(0)
    for place in rng.integers(0, min(len(content), 2000), 12).tolist():
        yield content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
    yield content + b"more"
    yield b"[" * 200_000
    yield b"\0" * 100


def damaged_json(content: bytes) -> Iterator[bytes]:
    """A JSON object with keys of other types, missing keys, and more keys."""
    value = json.loads(content)
    for name in value:
        yield from (
            json.dumps(value | {name: other}).encode()
            for other in (None, True, -1, 0.5, 10**30, "", "x", [], {}, [[]], float("nan"))
        )
        yield json.dumps({key: entry for key, entry in value.items() if key != name}).encode()
    yield json.dumps(value | {"unknown": 1}).encode()
    yield json.dumps([value]).encode()


@pytest.fixture(scope="module")
def folder(pipeline_folder: Path, token_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, tokens of a drawing, settings and a store; each test changes one file of a copy."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(pipeline_folder, folder / "model")
    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    drawing = TokenFile(
        tokens=torch.tensor([[1, 2]]), num_tokens=torch.tensor([2]), class_labels=[0], seeds=[0],
        sampling=SamplingConfig(), fingerprint=pipeline.tokens_fingerprint,
    )  # fmt: skip
    drawing.save(folder / "tokens.npz")
    settings = ModelSettings(by_num_tokens={4: SamplingConfig()}, fingerprint="x", measured={})
    settings.save(folder / "model" / "generator")
    shutil.copytree(token_store, folder / "store")
    return folder


LOADERS: dict[str, Callable[[Path], object]] = {
    "model/tokenizer/config.json": lambda root: ChannelTokenizer.from_pretrained(root / "model/tokenizer"),
    "model/tokenizer/model.safetensors": lambda root: ChannelTokenizer.from_pretrained(root / "model/tokenizer"),
    "model/generator/config.json": lambda root: ChannelGPT.from_pretrained(root / "model/generator"),
    "model/generator/model.safetensors": lambda root: ChannelGPT.from_pretrained(root / "model/generator"),
    "model/generator/sampling.json": lambda root: ModelSettings.load(root / "model/generator", "x"),
    "tokens.npz": lambda root: TokenFile.load(root / "tokens.npz"),
    "store/store.json": lambda root: TokenStore.open(root / "store"),
    "store/train-00000.json": lambda root: TokenStore.open(root / "store"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_are_read_or_refused_with_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    content = (root / name).read_bytes()
    LOADERS[name](root)
    cases = [*damaged_bytes(content), *(damaged_json(content) if name.endswith(".json") else ())]
    refused = 0
    for case in cases:
        (root / name).write_bytes(case)
        try:
            LOADERS[name](root)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert len(cases) >= 20
    assert refused >= len(cases) // 2


def archive(path: Path, header: str, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        text = header.encode().ljust(117) + b"\n"
        file.writestr("tokens.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data)


def test_arrays_beyond_the_file_or_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for descr, shape in (("<i8", "(1000000000000,)"), ("<i8", "(-1,)"), ("|O", "(1,)"), ("<i8', __import__('os')", "")):
        archive(tmp_path / "a.npz", f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}", b"0" * 8)
        with pytest.raises(InputError, match=r"a\.npz is not a \.npz file, or is damaged"):
            load_arrays(tmp_path / "a.npz")
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (4000000,), }"
    archive(tmp_path / "a.npz", header, bytes(4_000_000), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    assert load_arrays(tmp_path / "a.npz")["tokens"].shape == (4_000_000,)
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.raises(InputError, match="allowed are 500,000 on this machine"):
        load_arrays(tmp_path / "a.npz")


def test_weights_that_are_not_finite_are_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    model = ChannelGPT.from_pretrained(pipeline_folder / "generator")
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"norm\.weight has entries that are not finite"):
        ChannelGPT.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------- wrong results


def test_values_that_are_no_integers_are_refused_and_those_of_numpy_accepted(pipeline_folder: Path) -> None:
    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    for wrong in ({"class_labels": [0.7]}, {"seed": [0.5]}, {"class_labels": ["0"]}, {"prefix": torch.rand(1, 3)}):
        with pytest.raises(InputError, match="integer"):
            pipeline(**{"class_labels": [0], **wrong})
    expected = pipeline([1], seed=3).tokens
    prefix = expected[:, :4].to(torch.uint16)
    assert torch.equal(pipeline(np.array([1]), seed=np.int32(3), prefix=prefix).tokens, expected)
    with pytest.raises(InputError, match="a prefix has 4 tokens"):
        pipeline.stream_best([1], 4, 1, prefix=expected[:, :4])


def test_a_link_to_a_parent_folder_is_not_followed(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder / "train", tmp_path / "train")
    before = FolderSource(tmp_path / "train")
    (tmp_path / "train" / "n01" / "loop").symlink_to("..")
    assert FolderSource(tmp_path / "train").fingerprint() == before.fingerprint()


# ------------------------------------------------------------------------------------- leftovers and concurrency

HOLD = """
import sys, time
from common.files import exclusive_folder
with exclusive_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_has_one_writer_until_that_ends(scripts: ScriptRunner, tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    other = subprocess.Popen(words, env=scripts.environment, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    (tmp_path / "out" / ".00000.png.1.partial").write_text("half")
    with pytest.raises(InputError, match="another process writes to"), exclusive_folder(tmp_path / "out"):
        pass
    other.kill()
    other.wait()
    with exclusive_folder(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert list((tmp_path / "out").iterdir()) == []


def test_sigterm_keeps_what_has_been_drawn(scripts: ScriptRunner, slow_pipeline_folder: Path, tmp_path: Path) -> None:
    words = ["--model", slow_pipeline_folder, "--class-labels", 1, "--samples-per-class", 10_000, "--batch-size", 2]
    running = scripts.start("sample.py", *words, cwd=tmp_path)
    while not list((tmp_path / "samples" / ".partial").glob("0*.png")):
        assert running.poll() is None
        time.sleep(0.01)
    running.kill(signal.SIGTERM)
    done = running.wait(60)
    assert done.code == 0, done.err
    assert "of 10000 images written" in done.err
    assert len(TokenFile.load(tmp_path / "samples" / "tokens.npz").seeds) >= 2


def test_a_kill_or_a_full_disk_while_drawing_keeps_the_earlier_images(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--class-labels", 0, 1]
    assert scripts("sample.py", *words, cwd=tmp_path).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    for failure in ("os._exit(9)", "raise OSError(28, 'No space left on device', 'x')"):
        broken = f"import os, generator.session as s\ndef fail(*a, **k):\n    {failure}\ns.Session._grid = fail"
        done = scripts("sample.py", *words, "--seed", 5, before=broken, cwd=tmp_path)
        assert done.code in (9, 2)
        after = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir() if path.is_file()}
        assert {name: after.get(name) for name in before} == before
    assert scripts("sample.py", *words, "--seed", 5, cwd=tmp_path).code == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(before)
    assert before["00000.png"] != (tmp_path / "samples" / "00000.png").read_bytes()


# ------------------------------------------------------------------------------------- training folders


@pytest.fixture(scope="module")
def generator_run(scripts: ScriptRunner, token_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags of a finished run of two steps; the last one is its folder."""
    words: list[object] = ["--tokens", token_store, "--num-layers", 1, "--num-heads", 2, "--hidden-size", 16]
    words += ["--intermediate-size", 16, "--steps", 2, "--batch-size", 4, "--warmup-steps", 1, "--num-workers", 0]
    words += ["--prior-steps", 0, "--checkpoint-every", 2, "--evaluate-every", 2, "--validation-images", 4]
    words += ["--output-dir", tmp_path_factory.mktemp("training") / "run"]
    done = scripts("train_ar.py", *words)
    assert done.code == 0, done.err
    return words


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_another_model_is_not_overwritten(
    scripts: ScriptRunner, generator_run: list[object], pipeline_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    shutil.copytree(pipeline_folder / "tokenizer", tmp_path / "part" / "tokenizer")
    model = ChannelTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    model.save_pretrained(tmp_path / "part" / "tokenizer")
    for name, message in (("model", "is not empty"), ("part", "is not the tokenizer of")):
        before = contents(tmp_path / name)
        done = scripts("train_ar.py", *generator_run[:-1], tmp_path / name)
        assert (done.code, message in done.err) == (2, True), done.err
        assert contents(tmp_path / name).items() >= before.items()


def without_a_tensor(content: bytes) -> bytes:
    tensors = load(content)
    name = next(name for name in tensors if name.startswith("model."))
    return save({other: value for other, value in tensors.items() if other != name})


def with_a_tensor_cut(content: bytes) -> bytes:
    tensors = load(content)
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    return save(tensors | {name: tensors[name].flatten()[:1]})


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("log.jsonl", lambda content: b"[]\n" + content, "is not a record with a step"),
        ("log.jsonl", lambda content: b"\xff\n" + content, "is damaged"),
        ("training.json", lambda content: b"{}", "is damaged"),
        ("training.json", lambda content: content[:50], "is not readable JSON"),
        ("training.json", lambda content: content.replace(b'"seed"', b'"sprout"'), "is of another version"),
        ("training.safetensors", lambda content: content[:500], "is damaged"),
        ("training.safetensors", without_a_tensor, "has no tensor"),
        ("training.safetensors", with_a_tensor_cut, "of shape"),
    ],
)
def test_a_damaged_run_is_not_resumed(
    scripts: ScriptRunner, generator_run: list[object], tmp_path: Path, name: str,
    damage: Callable[[bytes], bytes], message: str,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(Path(str(generator_run[-1])), folder)
    (path,) = folder.rglob(name)
    path.write_bytes(damage(path.read_bytes()))
    done = scripts("train_ar.py", *generator_run[:-1], folder, "--resume", "--steps", 3)
    assert (done.code, message in done.err) == (2, True), done.err
    assert done.err.count("\n") == 1
