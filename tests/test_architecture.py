"""Rules of imports over the syntax tree of every product file, and modules that a process loads."""

import ast
import json
import subprocess
import sys
from pathlib import PurePosixPath

import pytest
from conftest import REPO

import benchmark

PACKAGES = ("common", "tokenizer", "generator", "training", "evaluation", "refiner", "page")
MAX_LINES = 350
PRODUCT = sorted(
    path.relative_to(REPO).as_posix() for pattern in ("*.py", *(f"{p}/**/*.py" for p in PACKAGES))
    for path in REPO.glob(pattern)
)  # fmt: skip
SCRIPTS = {PurePosixPath(path).stem for path in PRODUCT if "/" not in path}
TRAINING_MODULES = {"training.py", "objective.py", "rate.py", "progress.py", "classifier.py"}
COMMAND_LINE = {"argparse", "optparse", "getopt", "click", "typer", "fire", "absl"}


def package(path):
    """The package of a file; "scripts" for files outside the packages."""
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else "scripts"


def dotted(node):
    """The name or attribute as `a.b.c`, otherwise ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def imports(path, tree):
    """Full names of all imports of a file, at any level, relative ones resolved."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = PurePosixPath(path).parts[: -node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def used(path, tree):
    """Imported names and dotted names."""
    return [*imports(path, tree), *(dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))]


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def wrong_package(path, tree):
    home, name = package(path), PurePosixPath(path).name
    allowed = {"common", home}
    if home == "scripts":
        allowed = set(PACKAGES)
    elif home == "evaluation":
        allowed |= {"tokenizer", "generator", "refiner"}
    elif home == "page":
        allowed |= {"generator"}
    elif path == "generator/pipeline.py":
        allowed |= {"tokenizer", "refiner"}
    if name in TRAINING_MODULES:
        allowed |= {"training"}
    ours = {*PACKAGES, *SCRIPTS, "tests", "oracles", "conftest"}
    roots = [name.split(".")[0] for name in imports(path, tree)]
    return [f"{package(path)} imports {root}" for root in roots if root in ours - allowed]


def command_line_elsewhere(path, tree):
    if path == "common/cli.py":
        return []
    return [name for name in used(path, tree) if name.split(".")[0] in COMMAND_LINE or name == "sys.argv"]


def weights_elsewhere(path, tree):
    if path == "common/checkpoint.py":
        return []
    names = [name for name in used(path, tree) if name.split(".")[0] in ("safetensors", "pickle", "dill")]
    return names + [name for name in used(path, tree) if name in ("torch.load", "torch.save")]


def library_elsewhere(path, tree):
    allowed = {
        "torch_fidelity": path == "evaluation/features.py",
        "gradio": path == "page/layout.py",
        "transformers": path == "evaluation/speed/samplers.py",
        "accelerate": path == "common/runtime.py"
        or package(path) in ("scripts", "training")
        or PurePosixPath(path).name == "training.py",
    }
    return [name for name in imports(path, tree) if not allowed.get(name.split(".")[0], True)]


def getattr_with_default(path, tree):
    return ["getattr with a default" for call in calls(tree) if dotted(call.func) == "getattr" and len(call.args) > 2]


def loose_loading(path, tree):
    return [
        f"{word.arg}=False"
        for call in calls(tree)
        for word in call.keywords
        if word.arg in ("strict", "weights_only")
        and isinstance(word.value, ast.Constant)
        and word.value.value is False
        and dotted(call.func) != "zip"
    ]


def main_in_packages(path, tree):
    if package(path) == "scripts":
        return []
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    return ["__main__" for node in compared if dotted(node.left) == "__name__"]


RULES = [
    wrong_package,
    command_line_elsewhere,
    weights_elsewhere,
    library_elsewhere,
    getattr_with_default,
    loose_loading,
    main_in_packages,
]


def violations(path, source):
    """Lines "rule: what", one for each violation in a source."""
    tree = ast.parse(source)
    found = [f"{rule.__name__}: {what}" for rule in RULES for what in rule(path, tree)]
    lines = len(source.splitlines())
    return found + ([f"too_long: {lines} lines"] if lines > MAX_LINES else [])


def test_all_product_files_are_checked():
    assert {"train_tokenizer.py", "common/cli.py", "tokenizer/bsq.py", "generator/pipeline.py"} <= set(PRODUCT)
    assert not [path for path in PRODUCT if path.startswith("tests")]


@pytest.mark.parametrize("path", PRODUCT)
def test_product_files_follow_the_rules(path):
    assert violations(path, (REPO / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("tokenizer/a.py", "from generator.config import ChannelGPTConfig", "wrong_package"),
        ("tokenizer/a.py", "import generator", "wrong_package"),
        ("tokenizer/a.py", "from ..generator import config", "wrong_package"),
        ("tokenizer/a.py", "def f():\n    import generator.model", "wrong_package"),
        ("generator/a.py", "from tokenizer import ChannelTokenizer", "wrong_package"),
        ("generator/training.py", "import tokenizer.config as c", "wrong_package"),
        ("generator/pipeline.py", "import sample", "wrong_package"),
        ("common/a.py", "from tokenizer.bsq import pack_bits", "wrong_package"),
        ("common/a.py", "from generator import model", "wrong_package"),
        ("common/a.py", "import train_tokenizer", "wrong_package"),
        ("extract_tokens.py", "from train_tokenizer import main", "wrong_package"),
        ("sample.py", "from tests.oracles import bits", "wrong_package"),
        ("sample.py", "import argparse", "command_line_elsewhere"),
        ("tokenizer/a.py", "from argparse import ArgumentParser", "command_line_elsewhere"),
        ("sample.py", "import sys\nx = sys.argv[1]", "command_line_elsewhere"),
        ("generator/tokens.py", "from safetensors.torch import save_file", "weights_elsewhere"),
        ("training/loop.py", "import safetensors", "weights_elsewhere"),
        ("tokenizer/a.py", "import torch\nx = torch.load('a', weights_only=True)", "weights_elsewhere"),
        ("tokenizer/a.py", "from torch import save", "weights_elsewhere"),
        ("tokenizer/a.py", "import torch\ntorch.save({}, 'a')", "weights_elsewhere"),
        ("common/checkpoints.py", "import pickle", "weights_elsewhere"),
        ("benchmark.py", "import torch_fidelity", "library_elsewhere"),
        ("tokenizer/fid.py", "from torch_fidelity import calculate_metrics", "library_elsewhere"),
        ("sample.py", "from transformers import LlamaForCausalLM", "library_elsewhere"),
        ("page/studio.py", "import gradio as gr", "library_elsewhere"),
        ("page/studio.py", "from tokenizer import ChannelTokenizer", "wrong_package"),
        ("generator/model.py", "def f():\n    import transformers.models.llama", "library_elsewhere"),
        ("tokenizer/losses.py", "from accelerate import Accelerator", "library_elsewhere"),
        ("common/cli.py", "import accelerate.utils", "library_elsewhere"),
        ("sample.py", "x = getattr(a, 'b', None)", "getattr_with_default"),
        ("common/a.py", "model.load_state_dict(state, strict=False)", "loose_loading"),
        ("common/checkpoint.py", "import torch\ntorch.load('a', weights_only=False)", "loose_loading"),
        ("common/a.py", "if __name__ == '__main__':\n    f()", "main_in_packages"),
        ("common/a.py", "x = 1\n" * 351, "too_long"),
    ],
)
def test_violations_are_found(path, source, rule):
    found = violations(path, source)
    assert [line for line in found if line.startswith(f"{rule}: ")]
    assert {line.split(":")[0] for line in found} == {rule}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sample.py", "from common import cli\nfrom generator import model\nimport tokenizer.bsq\nprint('done')"),
        ("sample.py", "if __name__ == '__main__':\n    f()"),
        ("generator/pipeline.py", "from tokenizer import ChannelTokenizer"),
        ("generator/model.py", "from common.errors import InputError\nfrom generator.config import ChannelGPTConfig"),
        ("tokenizer/a.py", "from . import bsq\nfrom .bsq import pack_bits\nimport tokenizers\nimport sampler"),
        ("common/cli.py", "import argparse\nimport sys\nx = sys.argv"),
        ("common/checkpoint.py", "import safetensors, torch\ntorch.load('a', weights_only=True)"),
        ("evaluation/features.py", "import torch_fidelity"),
        ("evaluation/speed/samplers.py", "from transformers import LlamaConfig"),
        ("training/loop.py", "from accelerate import Accelerator"),
        ("common/runtime.py", "def f():\n    from accelerate import PartialState"),
        ("train_ar.py", "from accelerate import Accelerator"),
        ("common/a.py", "getattr(a, 'b')\nzip(a, b, strict=False)\nload(a, strict=True)\nx = 'print(1)'"),
        ("common/a.py", "x = 1\n" * 350),
    ],
)
def test_allowed_code_has_no_violations(path, source):
    assert violations(path, source) == []


def in_a_process(code, *arguments):
    """What Python code prints as JSON, in a process of its own."""
    words = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SCRIPTS_IN_PROCESS = """
import contextlib, io, json, runpy, sys
found = []
commands, heavy = json.loads(sys.argv[1])
for words in commands:
    sys.argv, code = words, None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    found.append([code, err.getvalue(), sorted(set(heavy) & sys.modules.keys())])
print(json.dumps(found))
"""


def test_help_and_mistakes_load_no_large_library():
    starts = [[f"{script}.py"] for script in sorted(SCRIPTS)]
    starts += [["benchmark.py", command] for command in benchmark.COMMANDS]
    cases = [(start, last) for start in starts for last in ("--help", "--no-such-flag")]
    heavy = ["torch", "transformers", "numpy", "accelerate", "matplotlib", "torchmetrics", "torch_fidelity", "gradio"]
    found = in_a_process(SCRIPTS_IN_PROCESS, [[*start, last] for start, last in cases], heavy)
    for (start, last), (code, err, loaded) in zip(cases, found, strict=True):
        assert (code, err.count("\n")) == ((0, 0) if last == "--help" else (2, 1)), (start, last, err)
        assert loaded == [], (start, last)


DRAWING = """
import json, runpy, sys
words, heavy = json.loads(sys.argv[1])
sys.argv = words
try:
    runpy.run_path("sample.py", run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted(set(heavy) & sys.modules.keys())]))
"""


def test_drawing_loads_no_library_of_training_or_measuring(pipeline_folder, tmp_path):
    words = ["sample.py", "--model", pipeline_folder, "--class-labels", 0, "--output-dir", tmp_path / "out"]
    heavy = ["transformers", "accelerate", "torch_fidelity", "torchmetrics", "datasets", "matplotlib"]
    heavy += ["huggingface_hub", "torchvision"]
    assert in_a_process(DRAWING, list(map(str, words)), heavy) == [0, []]
    assert (tmp_path / "out" / "grid.png").exists()
