"""Small models, pictures, a token store, and a fast way to run scripts: shared by all tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurement import words
from PIL import Image
from torch import nn
from torchvision.models import vgg16

from common.classifier import PictureClassifier
from common.config import ClassifierConfig
from common.files import folder_written_whole
from generator.config import ChannelGPTConfig
from generator.decode import CachedDecoder
from generator.engine import Batch, Engine
from generator.model import ChannelGPT
from generator.tokens import StoreHeader, TokenStore
from tokenizer import ChannelTokenizer, TokenizerConfig

torch.set_num_threads(1)  # tiny models gain nothing from a second one, and would wait for it on a busy machine
REPO = Path(__file__).resolve().parents[1]
CLASS_NAMES = [
    "goldfish, Carassius auratus",
    "tench, Tinca tinca",
    "great white shark, white shark, man-eater",
    "hen",
    "ostrich, Struthio camelus",
]

# Importing torch and transformers takes longer than what most script tests do. So one process imports
# them once and forks for each run; the fork runs the script's file as __main__, as a user's shell would.
# It answers each line at once, {"runs": [...]} with the pids, {"pids": [...]} with an exit code or null for
# each, so that it can be asked for other things while a script runs; what still runs at its end is killed.
FORK_SERVER = """
import json, os, runpy, signal, sys, traceback
import accelerate, torchvision, torch_fidelity
import evaluation.fid.measure, generator.session, evaluation.speed.report, generator.training, tokenizer.extraction

running, ended = set(), {}

def reap(number, frame):
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    except ChildProcessError:
        pass

def run(job):
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    sys.argv = [job["script"], *job["arguments"]]
    exec(job["before"], {})
    runpy.run_path(job["script"], run_name="__main__")

def fork(job):
    pid = os.fork()
    if pid:
        running.add(pid)
        return pid
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 0
    try:
        run(job)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

signal.signal(signal.SIGCHLD, reap)
for line in sys.stdin:
    question = json.loads(line)
    if "runs" in question:
        answer = [fork(job) for job in question["runs"]]
    else:
        answer = [ended.pop(pid) if pid in ended else None for pid in question["pids"]]
        running -= {pid for pid, code in zip(question["pids"], answer) if code is not None}
    print(json.dumps(answer), flush=True)
for pid in running - ended.keys():
    os.kill(pid, signal.SIGKILL)
"""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a script's run left: its exit code (negative: the signal that ended it) and what it wrote.

    Of several processes, the first code that is not 0, and their output one after the other.
    """

    code: int
    out: str
    err: str


class Running:
    """A script that runs in one process or several; `pids` are theirs, by rank."""

    def __init__(self, pids: list[int], outputs: list[tuple[Path, Path]], ask: Callable[[object], list[Any]]):
        self.pids = pids
        self._outputs, self._ask = outputs, ask
        self._codes: dict[int, int] = {}

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to each process that has not ended."""
        self.poll()
        for pid in self.pids:
            if pid not in self._codes:
                os.kill(pid, number)

    def poll(self) -> Finished | None:
        """What the run left, or None while one of its processes is still at work."""
        missing = [pid for pid in self.pids if pid not in self._codes]
        found = self._ask({"pids": missing}) if missing else []
        self._codes |= {pid: code for pid, code in zip(missing, found, strict=True) if code is not None}
        if len(self._codes) < len(self.pids):
            return None
        out, err = ("".join(path.read_text() for path in paths) for paths in zip(*self._outputs, strict=True))
        return Finished(code=next((c for pid in self.pids if (c := self._codes[pid])), 0), out=out, err=err)

    def wait(self, seconds: float = 600) -> Finished:
        """What the run left, at its end; a run that takes longer than this is killed, and the test fails."""
        end = time.monotonic() + seconds
        while (finished := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError("\n".join(err.read_text() for _, err in self._outputs))
            time.sleep(0.003)
        return finished


class ScriptRunner:
    """Runs scripts of the repository, each in a fresh fork of one process that has the imports done."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._server: subprocess.Popen[str] | None = None
        self._runs = 0

    def command(self, script: str, arguments: Sequence[object]) -> list[str]:
        """The words a user would type, for tests that want a process of their own."""
        return [sys.executable, str(REPO / script), *map(str, arguments)]

    def __call__(
        self, script: str, *arguments: object, processes: int = 1, before: str = "", cwd: Path | None = None
    ) -> Finished:
        """Run a script to its end, as `start` does."""
        return self.start(script, *arguments, processes=processes, before=before, cwd=cwd).wait()

    def start(
        self, script: str, *arguments: object, processes: int = 1, before: str = "", cwd: Path | None = None
    ) -> Running:
        """Start a script; several processes find each other on the CPU as those of torchrun do.

        `before` is Python code that each process executes first.
        """
        self._runs += 1
        outputs = [
            (self.folder / f"{self._runs}-{rank}.out", self.folder / f"{self._runs}-{rank}.err")
            for rank in range(processes)
        ]
        job = {
            "script": str(REPO / script),
            "arguments": [str(argument) for argument in arguments],
            "before": before,
            "cwd": str(cwd or self.folder),
        }
        environments: list[dict[str, str]] = [{}]
        if processes > 1:
            together = {
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "ACCELERATE_USE_CPU": "true",
            }
            environments = [together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        runs = [
            job | {"environment": environment, "out": str(out), "err": str(err)}
            for environment, (out, err) in zip(environments, outputs, strict=True)
        ]
        return Running(self._ask({"runs": runs}), outputs, self._ask)

    def _ask(self, question: object) -> list[Any]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", FORK_SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.environment,
                cwd=self.folder,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the fork server ended"
        return list(json.loads(answer))

    def close(self) -> None:
        """End the server, and with it what still runs."""
        if self._server is not None:
            self._server.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptRunner]:
    runner = ScriptRunner(tmp_path_factory.mktemp("scripts"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> ChannelTokenizer:
    """32 x 32 pixels, 16 tokens of 6 bits; random weights."""
    config = TokenizerConfig(
        image_size=32,
        num_channels=16,
        patch_size=2,
        encoder_widths=[32, 32],
        decoder_widths=[32],
        num_bits=6,
        num_heads=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ChannelTokenizer(config).eval()


def tiny_config(tokenizer: ChannelTokenizer, num_layers: int = 2, **changes: Any) -> ChannelGPTConfig:
    """Of a generator with the tokens of the tiny tokenizer."""
    fields: dict[str, Any] = {
        "num_layers": num_layers,
        "num_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_channels": 16,
        "num_bits": 6,
        "class_names": CLASS_NAMES,
        "tokenizer_fingerprint": tokenizer.token_fingerprint(),
        "has_null_label": True,
    }
    return ChannelGPTConfig(**fields | changes)


def sharp_generator(config: ChannelGPTConfig) -> ChannelGPT:
    """A random generator with large weights everywhere, so that its odds are far from even and depend on all inputs."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        model = ChannelGPT(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name == "prior.weight":
                parameter.normal_(std=0.15)
            elif "prior" in name:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.0 if "vectors" in name else 0.2)
    return model


@pytest.fixture(scope="session")
def tiny_generator(tiny_tokenizer: ChannelTokenizer) -> ChannelGPT:
    return sharp_generator(tiny_config(tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_decoder(tiny_generator: ChannelGPT) -> CachedDecoder:
    return CachedDecoder.from_model(tiny_generator)


@pytest.fixture(scope="session")
def tiny_engine(tiny_decoder: CachedDecoder) -> Engine:
    return Engine(tiny_decoder)


@pytest.fixture
def watch_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], list[tuple[int, int, bool]]]:
    """A function that notes (rows, position, whether odds are computed) of every later step of an engine."""

    def watch(engine: Engine) -> list[tuple[int, int, bool]]:
        steps: list[tuple[int, int, bool]] = []
        blocks, odds = engine._blocks, engine._odds

        def noted_blocks(batch: Batch, length: int) -> torch.Tensor:
            steps.append((batch.cache.entries.shape[2], int(batch.position), False))
            return blocks(batch, length)

        def noted_odds(batch: Batch, hidden: torch.Tensor, guided: bool) -> tuple[torch.Tensor, torch.Tensor]:
            steps[-1] = (*steps[-1][:2], True)
            return odds(batch, hidden, guided)

        monkeypatch.setattr(engine, "_blocks", noted_blocks)
        monkeypatch.setattr(engine, "_odds", noted_odds)
        return steps

    return watch


def save_pipeline(folder: Path, tokenizer: ChannelTokenizer, generator: ChannelGPT) -> Path:
    """Write a model folder, tokenizer/ and generator/."""
    tokenizer.save_pretrained(folder / "tokenizer")
    generator.save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer, tiny_generator: ChannelGPT
) -> Path:
    """A model folder. Tests that change it work on a copy."""
    return save_pipeline(tmp_path_factory.mktemp("model"), tiny_tokenizer, tiny_generator)


@pytest.fixture(scope="session")
def slow_pipeline_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer) -> Path:
    """As `pipeline_folder`, with so many layers that an image takes a while."""
    model = sharp_generator(tiny_config(tiny_tokenizer, num_layers=40))
    return save_pipeline(tmp_path_factory.mktemp("slow-model"), tiny_tokenizer, model)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes, PNG and JPEG of several sizes. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((32 + 8 * i, 40), Image.Resampling.BICUBIC)
                picture.save(folder / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 24 pictures to train on and 6 to look at; half PNG, half JPEG. Tests change only copies."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name in ("hen", "tench"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
                picture = Image.fromarray(pixels).resize((16 + i, 20), Image.Resampling.BICUBIC)
                picture.save(folder / split / name / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="session")
def token_store(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer) -> Path:
    """64 random sequences in two shards, the same for val; the first token is unique, its first bits give the class."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(3)
    tokens = torch.from_numpy(rng.integers(0, 64, (64, 1, 16)))
    tokens[:, 0, 0] = torch.arange(64)
    labels = torch.arange(5).repeat_interleave(torch.tensor([16, 16, 16, 8, 8]))
    header = StoreHeader(
        tokenizer_fingerprint=tiny_tokenizer.token_fingerprint(),
        num_channels=16,
        num_bits=6,
        class_names=CLASS_NAMES,
        views="none",
        shard_size=40,
        split_files={"train": 64, "val": 64},
        listings={"train": "a", "val": "b"},
    )
    store = TokenStore.create(folder, header)
    with folder_written_whole(store.tokenizer_folder) as temporary:
        tiny_tokenizer.save_pretrained(temporary)
    for split in ("train", "val"):
        store.write_shard(split, 0, tokens[:40], labels[:40], [])
        store.write_shard(split, 1, tokens[40:], labels[40:], [])
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch-fidelity's InceptionV3 with random weights, scaled so that signals pass through."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    class Random(inception.FeatureExtractorInceptionV3):
        """As it is before any weights are loaded."""

        def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
            return None

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        network = Random("inception", ["2048"], str(folder / "empty.pth"))
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="session")
def vgg() -> nn.Module:
    """The convolutions of torchvision's VGG-16, random, scaled so that signals pass through."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        with torch.device("meta"):
            features = vgg16(weights=None).features
        features = features.to_empty(device="cpu")
        for parameter in features.parameters():
            parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1)
    return features.eval()


@pytest.fixture(scope="session")
def vgg_weights(vgg: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torchvision stores them: the convolutions, and a classifier that LPIPS has no use for."""
    state = {f"features.{name}": value for name, value in vgg.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of 32 x 32 pictures that knows the tiny model's classes, in another order, and one more."""
    path = tmp_path_factory.mktemp("classifier") / "features.safetensors"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(6)
        config = ClassifierConfig(classifier_size=32, widths=[8, 16])
        model = PictureClassifier(config, ["something else", *reversed(CLASS_NAMES)])
        for parameter in model.parameters():  # a fresh one says the same of every picture
            parameter.normal_(std=0.4)
    model.save(path)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures in 5 class folders, of several sizes."""
    folder = tmp_path_factory.mktemp("reference")
    rng = np.random.default_rng(7)
    for i in range(12):
        path = folder / f"class{i % 5}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40 + i, 36), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def class_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the folders of `photographs` are called: the tiny model's classes, the other way round."""
    path = tmp_path_factory.mktemp("names") / "names.json"
    path.write_text(json.dumps({f"class{i}": name for i, name in enumerate(reversed(CLASS_NAMES))}))
    return path


@pytest.fixture(scope="session")
def measured(
    tmp_path_factory: pytest.TempPathFactory,
    scripts: ScriptRunner,
    pipeline_folder: Path,
    photographs: Path,
    classifier: Path,
    class_names: Path,
) -> Path:
    """One run with everything on."""
    folder = tmp_path_factory.mktemp("measured")
    flags = ["--anchors", "--save-images", "--save-npz", "--class-names", class_names]
    done = scripts("benchmark.py", *words(pipeline_folder, photographs, classifier, folder), *flags)
    assert done.code == 0, done.err
    return folder
