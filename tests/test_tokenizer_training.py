import json
import shutil

import pytest
from PIL import Image

import train_tokenizer
from common import cli
from common.config import InputError
from tokenizer import ChannelTokenizer
from training.checkpoints import write_card

FLAGS = [
    *("--image-size", 16, "--num-channels", 4, "--num-bits", 4, "--num-heads", 4),
    *("--encoder-widths", 32, 32, "--decoder-widths", 32),
    *("--steps", 8, "--batch-size", 4, "--warmup-steps", 2, "--learning-rate", 0.002, "--ema-decay", 0.9),
    *("--checkpoint-every", 2, "--evaluate-every", 4, "--validation-images", 4, "--entropy-group-bits", 4),
    *("--num-workers", 0, "--mixed-precision", "no", "--seed", 3, "--perceptual", "none"),
]

# SIGKILL with a checkpoint half written
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


def test_a_run_killed_in_a_checkpoint_is_resumed_with_the_bits_of_an_unbroken_one(train, unbroken, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, before=KILL_IN_CHECKPOINT).code == -9
    whole = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith(".")]
    assert max(whole) == "step-00000004"
    done = train(folder, "--resume", "--num-workers", 1)
    assert done.code == 0, done.err
    assert "resumed at step 4 of 8" in done.err
    for name in (
        "model.safetensors",
        "log.jsonl",
        "reconstructions/step-00000008.png",
        "checkpoints/step-00000008/training.safetensors",
    ):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_other_settings_images_or_folders_are_refused_and_a_complete_run_is_not_overwritten(
    train, unbroken, data, tmp_path
):
    before = everything(unbroken)
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "train" / "hen" / "00.jpg").unlink()
    assert train(unbroken, "--resume").code == 0
    assert "--resume" in mistake(train(unbroken))
    assert "with weight_decay = " in mistake(train(unbroken, "--resume", "--weight-decay", 0.001))
    assert "with model.num_bits = " in mistake(train(unbroken, "--resume", "--num-bits", 5))
    assert "with images = " in mistake(train(unbroken, "--resume", data_dir=tmp_path / "data"))
    assert str(tmp_path / "new") in mistake(train(tmp_path / "new", "--resume"))
    assert everything(unbroken) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [(["--l1-weight", "0"], "l1_weight and l2_weight"), (["--frozen-encoder"], "init_from"),
     (["--perceptual", "none", "--perceptual-weights", "a"], "perceptual is none")],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        cli.parse(*train_tokenizer.CONFIGS, argv=["--data-dir", "a", "--output-dir", "b", *settings])


@pytest.fixture
def damaged(data, tmp_path):
    """A copy of the pictures with one truncated JPEG in each split."""
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    for path in (folder / "train" / "hen" / "02.jpg", folder / "val" / "tench" / "00.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    return folder


def test_truncated_images_are_named_once_counted_and_skipped(train, damaged, tmp_path):
    flags = ("--num-workers", 1, "--validation-images", 6, "--batch-size", 12)
    flags = (*flags, "--steps", 5, "--checkpoint-every", 5, "--evaluate-every", 5)  # two epochs and a half
    done = train(tmp_path / "out", *flags, data_dir=damaged)
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
