import json
import shutil

import pytest
from PIL import Image

from tokenizer import ChannelTokenizer
from training.card import write_card

FLAGS = [
    *("--image-size", 16, "--num-channels", 4, "--num-bits", 4, "--num-heads", 4),
    *("--encoder-widths", 32, 32, "--decoder-widths", 32),
    *("--steps", 8, "--batch-size", 4, "--warmup-steps", 2, "--learning-rate", 0.002, "--ema-decay", 0.9),
    *("--checkpoint-every", 2, "--evaluate-every", 4, "--validation-images", 4, "--entropy-group-bits", 4),
    *("--num-workers", 0, "--mixed-precision", "no", "--seed", 3, "--perceptual", "none"),
]

# SIGKILL between two steps, or with a checkpoint half written
KILL_IN_STEP = """
import os, signal
from training.card import write_card
from training.trainer import Trainer
step = Trainer._step
def killed(self, *arguments):
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *arguments)
Trainer._step = killed
"""
KILL_IN_CHECKPOINT = """
import os, signal
from training import checkpoints as resuming
save = resuming.save_tensors
def killed(path, tensors):
    save(path, tensors)
    if "step-00000006" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
resuming.save_tensors = killed
"""


@pytest.fixture(scope="module")
def train(scripts, data):
    def run(output_dir, *more, data_dir=data, before=""):
        flags = ("--data-dir", data_dir, "--output-dir", output_dir, *FLAGS, *more)
        return scripts("train_tokenizer.py", *flags, before=before)

    return run


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(folder)
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    return folder


def everything(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def mistake(done):
    """The single line of stderr of a refused run."""
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("train_tokenizer.py: error: ")
    return done.err


def test_a_run_writes_model_checkpoints_pictures_and_log(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        *("model.safetensors", "config.json", "checkpoints", "reconstructions", "log.jsonl", "README.md"),
    }
    card = (unbroken / "README.md").read_text()
    figures = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()][-1]["evaluation"]
    assert f"- psnr_k4: {figures['psnr_k4']}\n" in card
    assert "- num_bits: 4\n" in card
    assert "step 8 " in card
    model = ChannelTokenizer.from_pretrained(unbroken)
    assert (model.config.image_size, model.config.num_channels, model.config.num_bits) == (16, 4, 4)
    checkpoints = sorted((unbroken / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000006", "step-00000008"]  # the newest two
    for path in checkpoints:
        assert {file.name for file in path.iterdir()} == {"training.safetensors", "training.json"}
    pictures = sorted((unbroken / "reconstructions").iterdir())
    assert [path.name for path in pictures] == ["step-00000004.png", "step-00000008.png"]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width > 3 * 96  # k = 1, k = 4 and the original
    records = log(unbroken)
    evaluations = [record for record in records if "evaluation" in record]
    assert [record["step"] for record in evaluations] == [4, 8]
    assert {"psnr_k1", "psnr_k4", "unreadable"} == evaluations[0]["evaluation"].keys()
    assert evaluations[0]["evaluation"]["unreadable"] == 0
    reported = [record for record in records if "loss" in record]
    assert reported[-1]["step"] == 8
    assert {"l1", "token_entropy", "codebook_entropy", "commitment"} <= reported[-1].keys()


def resume(train, folder, unbroken, *flags):
    """Resume a run from step 4, and compare its files with those of an unbroken one."""
    whole = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert max(whole) == "step-00000004"
    done = train(folder, "--resume", *flags)
    assert done.code == 0, done.err
    assert "resumed at step 4 of 8" in done.err
    for name in (
        "model.safetensors",
        "log.jsonl",
        "reconstructions/step-00000008.png",
        "checkpoints/step-00000008/training.safetensors",
    ):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_a_run_killed_in_a_checkpoint_is_resumed_with_the_bits_of_an_unbroken_one(train, unbroken, tmp_path):
    assert train(tmp_path / "run", before=KILL_IN_CHECKPOINT).code == -9
    resume(train, tmp_path / "run", unbroken, "--num-workers", 1)


@pytest.fixture
def halted(train, tmp_path):
    """A run that was killed after its checkpoint of step 4."""
    folder = tmp_path / "run"
    assert train(folder, before=KILL_IN_STEP).code == -9
    return folder


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [("--weight-decay", 0.001, "weight_decay"), ("--seed", 4, "seed"), ("--num-bits", 5, "model.num_bits"),
     ("--rate-weight", 0.1, "rate.rate_weight")],
)  # fmt: skip
def test_a_resume_with_other_settings_is_refused(train, unbroken, flag, value, named):
    before = everything(unbroken)
    line = mistake(train(unbroken, "--resume", flag, value))
    assert f"with {named} = " in line
    assert everything(unbroken) == before


def test_a_resume_with_other_images_is_refused(train, data, tmp_path):
    pictures, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, pictures)
    assert train(folder, data_dir=pictures, before=KILL_IN_STEP).code == -9
    (pictures / "train" / "hen" / "00.jpg").unlink()
    before = everything(folder)
    assert "with images = " in mistake(train(folder, "--resume", data_dir=pictures))
    assert everything(folder) == before


def test_a_complete_run_is_neither_continued_nor_overwritten(train, unbroken):
    before = everything(unbroken)
    done = train(unbroken, "--resume")
    assert done.code == 0, done.err
    assert "--resume" in mistake(train(unbroken))
    assert everything(unbroken) == before


def test_a_missing_or_damaged_checkpoint_is_refused(train, halted, tmp_path):
    assert str(tmp_path / "new") in mistake(train(tmp_path / "new", "--resume"))
    assert not (tmp_path / "new").exists()
    weights = halted / "checkpoints" / "step-00000004" / "training.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert str(weights) in mistake(train(halted, "--resume"))


def test_an_empty_class_and_a_missing_folder_are_refused(train, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "empty").mkdir()
    assert "empty" in mistake(train(tmp_path / "out", data_dir=tmp_path / "data"))
    (tmp_path / "data" / "train" / "empty").rmdir()
    shutil.rmtree(tmp_path / "data" / "val")
    assert str(tmp_path / "data" / "val") in mistake(train(tmp_path / "out", data_dir=tmp_path / "data"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [("--steps", 0, "steps"), ("--num-bits", 17, "num_bits"), ("--mask-probability", 2, "mask_probability"),
     ("--l1-weight", 0, "l1_weight"), ("--learning-rat", 1, "--learning-rate")],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(train, tmp_path, flag, value, named):
    assert named in mistake(train(tmp_path / "out", flag, value))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def damaged(data, tmp_path):
    """A copy of the pictures with one truncated JPEG in each split."""
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    for path in (folder / "train" / "hen" / "02.jpg", folder / "val" / "tench" / "00.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_images_are_named_once_counted_and_skipped(train, damaged, tmp_path, workers):
    done = train(
        tmp_path / "out", "--num-workers", workers, "--validation-images", 6, "--steps", 14, data_dir=damaged
    )  # two epochs and more
    assert done.code == 0, done.err
    assert ChannelTokenizer.from_pretrained(tmp_path / "out").config.num_channels == 4
    for path in ("train/hen/02.jpg", "val/tench/00.jpg"):
        assert done.err.count(f"skipped unreadable image {damaged / path}") == 1
    last = [record for record in log(tmp_path / "out") if "evaluation" in record][-1]
    assert last["evaluation"]["unreadable"] == 1  # of those held out
    assert "2 unreadable images were skipped" in done.err


def test_a_truncated_image_is_an_error_if_strict(train, damaged, tmp_path):
    done = train(tmp_path / "out", "--strict", "true", data_dir=damaged)
    assert done.code == 2, done.err
    lines = [line for line in done.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "02.jpg" in lines[0] or "00.jpg" in lines[0]
    assert "Traceback" not in done.err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_folder_without_one_readable_image_is_an_error(train, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "train").rglob("*.*"):
        path.write_bytes(b"no image")
    done = train(tmp_path / "out", data_dir=tmp_path / "data")
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert str(tmp_path / "data" / "train") in done.err.splitlines()[-1]


def test_a_model_card_shows_numbers_and_settings_but_no_paths(tmp_path):
    settings = {"steps": 8, "data_dir": "my/photos", "init_from": None, "model": {"num_bits": 4}}
    write_card(tmp_path, "RefinerTrainer", 1234, settings, {"loss": 0.5, "by_position": [1, 2]})
    card = (tmp_path / "README.md").read_text()
    assert "# ChannelTok refiner" in card and "step 1,234 " in card
    shown = [line for line in card.splitlines() if line.startswith("- ")]
    assert shown == ["- channeltok", "- image-generation", "- loss: 0.5", "- steps: 8", "- num_bits: 4"]
