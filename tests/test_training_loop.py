"""The training loop with everything on: discriminator, prior, micro-batches, processes, real kills, trackers."""

import json
import random
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import nn

from training.model_state import make_optimizer

MODEL = [
    *("--image-size", 16, "--num-channels", 4, "--num-bits", 4, "--num-heads", 4),
    *("--encoder-widths", 32, 32, "--decoder-widths", 32),
]
FLAGS = [
    *MODEL,
    *("--steps", 6, "--batch-size", 8, "--warmup-steps", 2, "--learning-rate", 0.002, "--ema-decay", 0.9),
    *("--checkpoint-every", 1, "--evaluate-every", 6, "--validation-images", 4, "--entropy-group-bits", 3),
    *("--num-workers", 0, "--mixed-precision", "no", "--seed", 3, "--perceptual", "none", "--keep-checkpoints", 3),
]
GAN = ["--gan-weight", 0.1, "--gan-start-step", 2, "--gan-width", 32, "--gan-layers", 1]
RATE = [
    *("--rate-weight", 0.02, "--late-rate-weight", 0.04, "--rate-warmup-steps", 3),
    *("--bit-noise", 0.2, "--prior-learning-rate", 0.05),
]
EVERYTHING = [*GAN, *RATE]


@pytest.fixture(scope="module")
def train(scripts, data):
    def run(output_dir, *more, **how):
        done = scripts("train_tokenizer.py", "--data-dir", data, "--output-dir", output_dir, *FLAGS, *more, **how)
        assert "Traceback" not in done.err, done.err
        return done

    return run


@pytest.fixture(scope="module")
def everything(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything") / "run"
    assert train(folder, *EVERYTHING).code == 0
    return folder


def curve(folder):
    """The figures of each step's report."""
    return [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["evaluation"] for line in lines if "evaluation" in line]


def close(found, expected, rtol):
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=rtol, abs=rtol), (name, theirs["step"])


# separate runs: a single bit flipped by rounding changes the discriminator
@pytest.mark.parametrize("flags", [GAN, RATE], ids=["gan", "rate"])
def test_two_processes_give_the_loss_curve_of_one(train, tmp_path, flags):
    assert train(tmp_path / "one", *flags).code == 0
    done = train(tmp_path / "two", *flags, processes=2)
    assert done.code == 0, done.err
    close(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=2e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(np.allclose(one[name], two[name], atol=2e-3) for name in one)
    assert any((one[name] != two[name]).any() for name in one)  # sums over two processes are rounded differently


@pytest.mark.parametrize("flags", [GAN, RATE], ids=["gan", "rate"])
def test_micro_batches_give_the_loss_curve_of_whole_batches(train, tmp_path, flags):
    flags = ("--entropy-weight", 0, "--commitment-weight", 0, *flags)
    for name, more in (("whole", ()), ("parts", ("--micro-batch-size", 2))):
        assert train(tmp_path / name, *flags, *more).code == 0
    quantizer = {"token_entropy", "codebook_entropy", "commitment"}  # these are each micro-batch's own
    whole, parts = (
        [{k: v for k, v in record.items() if k not in quantizer} for record in curve(tmp_path / name)]
        for name in ("whole", "parts")
    )
    close(parts, whole, rtol=1e-3)


def test_the_discriminator_is_trained_from_its_first_step_on(everything):
    records = curve(everything)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        active = record["step"] > 2
        assert all((name in record) == active for name in ("adversarial", "discriminator_loss"))
        expected = record["reconstruction"] + 0.1 * (record["token_entropy"] - record["codebook_entropy"])
        expected += 0.25 * record["commitment"] + record["rate"]
        if active:  # the adversarial loss uses the logits of the discriminator's own loss
            assert record["adversarial"] == pytest.approx(-record["discriminator_fake"], rel=1e-4, abs=1e-6)
            expected += 0.1 * record["adversarial"]
        assert record["loss"] == pytest.approx(expected, rel=1e-4)
    first, last = (load_file(everything / f"checkpoints/step-0000000{k}/training.safetensors") for k in (4, 6))
    assert (first["discriminator.model.trunk.0.weight"] != last["discriminator.model.trunk.0.weight"]).any()
    assert last["discriminator.optimizer.trunk.0.weight.step"] == 4


def test_the_prior_is_trained_logged_and_checkpointed_with_a_rate_term(train, everything, tmp_path):
    def state(folder, step):
        return load_file(folder / "checkpoints" / f"step-0000000{step}" / "training.safetensors")

    weight = state(everything, 6)["prior.model.weight"]
    assert weight.shape == (16 * 15 // 2,)
    assert (weight != 0).all()
    assert train(tmp_path / "first", *RATE, "--steps", 1).code == 0
    # Adam's first step moves a parameter by the learning rate: half of its peak, in a warm-up of two steps
    assert np.abs(state(tmp_path / "first", 1)["prior.model.bias"]).max() == pytest.approx(0.05 / 2, rel=1e-3)
    figures = {"nats_per_token", "bits_per_image", "nats_1", "nats_2_4"}
    for record in curve(everything):
        assert figures | {"rate", "prior_loss"} <= record.keys()
    (evaluation,) = evaluations(everything)
    assert figures <= evaluation.keys()
    assert evaluation["bits_per_image"] == pytest.approx(evaluation["nats_per_token"] * 4 / np.log(2), abs=0.01)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_sigkill_from_outside_at_random_times_leaves_no_trace(scripts, data, everything, tmp_path, seed):
    rng, folder, kills = random.Random(seed), tmp_path / "run", 0
    flags = ("--data-dir", data, "--output-dir", folder, *FLAGS, *EVERYTHING)
    checkpoints = folder / "checkpoints"
    for _ in range(3):
        before = set(checkpoints.glob("step-*"))
        resume = ("--resume",) if before else ()
        run = scripts.start("train_tokenizer.py", *flags, *resume)
        # the time is counted from the first new checkpoint on
        while run.poll() is None and set(checkpoints.glob("step-*")) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        run.kill()
        if run.wait().code == 0:
            break
        kills += 1
        for path in checkpoints.glob("step-*"):
            assert {file.name for file in path.iterdir()} == {"training.safetensors", "training.json"}
    else:
        done = scripts("train_tokenizer.py", *flags, "--resume")
        assert done.code == 0, done.err
    assert kills >= 1
    for name in ("model.safetensors", "log.jsonl", "checkpoints/step-00000006/training.safetensors"):
        assert (folder / name).read_bytes() == (everything / name).read_bytes(), name


KILL_AT_STEP_4 = """
import os, signal
from training.trainer import Trainer
step = Trainer._step
def killed(self, *arguments):
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *arguments)
Trainer._step = killed
"""


@pytest.mark.parametrize(
    "flags",
    [("--channels-last", "true", "--mixed-precision", "bf16"), ("--micro-batch-size", 4)],
    ids=["bf16", "micro"],
)
def test_a_run_is_resumed_exactly_in_any_layout_and_format(train, tmp_path, flags):
    assert train(tmp_path / "whole", *GAN, *RATE, *flags).code == 0
    assert train(tmp_path / "killed", *GAN, *RATE, *flags, before=KILL_AT_STEP_4).code == -9
    done = train(tmp_path / "killed", *GAN, *RATE, *flags, "--resume")
    assert "resumed at step 4 of 6" in done.err
    for name in ("model.safetensors", "log.jsonl", "checkpoints/step-00000006/training.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_restarted_before_its_first_checkpoint_has_a_new_log(train, tmp_path):
    flags = ("--checkpoint-every", 100, "--evaluate-every", 2)
    assert train(tmp_path / "run", *flags, before=KILL_AT_STEP_4).code == -9
    assert [record["step"] for record in curve(tmp_path / "run")] == [2, 4]
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "config.json").unlink()
    assert train(tmp_path / "run", *flags).code == 0
    assert [record["step"] for record in curve(tmp_path / "run")] == [2, 4, 6]


def test_a_perceptual_distance_is_minimised_and_not_saved(train, everything, vgg_weights, tmp_path):
    flags = ("--perceptual", "lpips", "--perceptual-weights", vgg_weights, "--lpips-weight", 2)
    done = train(tmp_path / "run", *flags, "--steps", 2, "--checkpoint-every", 2, "--evaluate-every", 2)
    assert done.code == 0, done.err
    (record,) = curve(tmp_path / "run")
    assert record["lpips"] > 0
    assert record["reconstruction"] == pytest.approx(0.25 * record["l1"] + 2 * record["lpips"], rel=1e-5)
    saved, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", everything))
    assert saved.keys() == expected.keys()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert not [name for name in load_file(checkpoint / "training.safetensors") if "perceptual" in name]


def test_a_run_with_a_loss_of_nan_stops_and_names_the_last_good_checkpoint(train, tmp_path):
    inject_nan = """
import torch
from tokenizer import training
real = training.tokenizer_loss
def loss(output, *more):
    terms = real(output, *more)
    with open("count", "a+") as file:
        file.write("x")
        steps = file.tell()
    if steps == 4:
        terms["loss"] = terms["loss"] * float("nan")
    return terms
training.tokenizer_loss = loss
"""
    folder = tmp_path / "run"
    before = f"import os; os.chdir({str(tmp_path)!r})\n" + inject_nan
    done = train(folder, "--checkpoint-every", 3, before=before)
    assert done.code == 2, done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("train_tokenizer.py: error: ")
    assert str(folder / "checkpoints" / "step-00000003") in line
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (folder / "model.safetensors").exists()
    resumed = train(folder, "--checkpoint-every", 3, "--resume", "--learning-rate", 0.001)
    assert resumed.code == 0, resumed.err


def test_rate_scales_change_learning_rates_and_remove_weight_decay():
    model = nn.ModuleDict({"prior": nn.Linear(2, 3), "priority": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    optimizer = make_optimizer(model, 0.4, (0.9, 0.99), 0.05, {"prior.": 0.1})
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names.pop(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert not names
    for name, settings in found.items():
        expected = 0.4 * (0.1 if name.startswith("prior.") else 1), 0.05 if name == "priority.weight" else 0
        assert settings == pytest.approx(expected), name


def test_tensorboard_gets_the_figures_of_the_log(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    assert train(folder, "--trackers", "tensorboard").code == 0
    (events,) = folder.rglob("events.out.tfevents.*.0")
    found = EventAccumulator(str(events.parent)).Reload()
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert losses == pytest.approx({record["step"]: record["loss"] for record in curve(folder)}, rel=1e-5)
    assert {"evaluation/psnr_k1", "images_per_second", "learning_rate"} <= set(found.Tags()["scalars"])


DYNAMO = "import os; os.environ['ACCELERATE_DYNAMO_BACKEND'] = 'INDUCTOR'"


@pytest.mark.parametrize(
    ("flags", "before", "named"),
    [
        (("--trackers", "tensorbord"), "", "tensorboard"),
        (("--micro-batch-size", 3), "", "micro_batch_size 3"),
        (("--gan-weight", 0.1), "", "gan_layers"),
        (("--perceptual", "lpips", "--perceptual-weights", "missing.pth"), "", "missing.pth"),
        (("--perceptual-weights", "missing.pth"), "", "perceptual is none"),
        ((), DYNAMO, "--compile"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(train, tmp_path, flags, before, named):
    done = train(tmp_path / "run", *flags, before=before)
    assert (done.code, done.err.count("\n"), named in done.err) == (2, 1, True), done.err
    assert not (tmp_path / "run").exists()
