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
TRAINING_MODULES = {"training.py", "objective.py", "rate.py", "classifier.py"}
ONLY_IN = {  # names that may be used in one file
    "common/cli.py": ("argparse", "sys.argv"),
    "common/checkpoint.py": ("safetensors", "pickle", "torch.load", "torch.save"),
    "evaluation/features.py": ("torch_fidelity",),
    "page/layout.py": ("gradio",),
    "evaluation/speed/samplers.py": ("transformers",),
}


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
    return [name for name in imports(path, tree) if name.split(".")[0] in ours - allowed]


def elsewhere(path, tree):
    attributes = [dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    used = {*imports(path, tree), *attributes}
    reserved = [name for home, names in ONLY_IN.items() if home != path for name in names]
    if path != "common/runtime.py" and package(path) not in ("scripts", "training") and "training.py" not in path:
        reserved.append("accelerate")
    return [name for name in used if any(name == word or name.startswith(f"{word}.") for word in reserved)]


def loose(path, tree):
    """Defaults of getattr, strict=False and weights_only=False, and scripts in packages."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            off = [w.arg for w in node.keywords if isinstance(w.value, ast.Constant) and w.value.value is False]
            if {"strict", "weights_only"} & set(off) and dotted(node.func) != "zip":
                found.append(f"{off}=False")
            if dotted(node.func) == "getattr" and len(node.args) > 2:
                found.append("getattr with a default")
        if isinstance(node, ast.Compare) and dotted(node.left) == "__name__" and package(path) != "scripts":
            found.append("__main__")
    return found


def too_long(path, tree):
    return [f"{tree.lines} lines"] if tree.lines > MAX_LINES else []


def violations(path, source):
    """The rules that a source breaks, each with what breaks it."""
    tree = ast.parse(source)
    tree.lines = len(source.splitlines())
    found = {rule.__name__: rule(path, tree) for rule in (wrong_package, elsewhere, loose, too_long)}
    return {rule: what for rule, what in found.items() if what}


def test_product_files_follow_the_rules():
    assert {"train_tokenizer.py", "common/cli.py", "tokenizer/bsq.py", "generator/pipeline.py"} <= set(PRODUCT)
    assert not [path for path in PRODUCT if path.startswith("tests")]
    found = {path: violations(path, (REPO / path).read_text(encoding="utf-8")) for path in PRODUCT}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("tokenizer/a.py", "from generator.config import ChannelGPTConfig", "wrong_package"),
        ("tokenizer/a.py", "from ..generator import config", "wrong_package"),
        ("tokenizer/a.py", "def f():\n    import generator.model", "wrong_package"),
        ("generator/training.py", "import tokenizer.config as c", "wrong_package"),
        ("generator/pipeline.py", "import sample", "wrong_package"),
        ("generator/model.py", "from training.trainer import Trainer", "wrong_package"),
        ("common/a.py", "from tokenizer.bsq import pack_bits", "wrong_package"),
        ("sample.py", "from tests.oracles import bits", "wrong_package"),
        ("page/studio.py", "from tokenizer import ChannelTokenizer", "wrong_package"),
        ("tokenizer/a.py", "from argparse import ArgumentParser", "elsewhere"),
        ("sample.py", "import sys\nx = sys.argv[1]", "elsewhere"),
        ("generator/tokens.py", "from safetensors.torch import save_file", "elsewhere"),
        ("tokenizer/a.py", "import torch\nx = torch.load('a', weights_only=True)", "elsewhere"),
        ("tokenizer/a.py", "from torch import save", "elsewhere"),
        ("benchmark.py", "import torch_fidelity", "elsewhere"),
        ("generator/model.py", "def f():\n    import transformers.models.llama", "elsewhere"),
        ("common/cli.py", "import accelerate.utils", "elsewhere"),
        ("sample.py", "x = getattr(a, 'b', None)", "loose"),
        ("common/a.py", "model.load_state_dict(state, strict=False)", "loose"),
        ("common/checkpoint.py", "import torch\ntorch.load('a', weights_only=False)", "loose"),
        ("common/a.py", "if __name__ == '__main__':\n    f()", "loose"),
        ("common/a.py", "x = 1\n" * 351, "too_long"),
        ("sample.py", "from common import cli\nimport tokenizer.bsq\nif __name__ == '__main__':\n    f()", None),
        ("generator/pipeline.py", "from tokenizer import ChannelTokenizer", None),
        ("tokenizer/a.py", "from . import bsq\nfrom .bsq import pack_bits\nimport tokenizers\nimport sampler", None),
        ("common/cli.py", "import argparse\nimport sys\nx = sys.argv", None),
        ("common/checkpoint.py", "import safetensors, torch\ntorch.load('a', weights_only=True)", None),
        ("training/loop.py", "from accelerate import Accelerator", None),
        ("common/a.py", "getattr(a, 'b')\nzip(a, b, strict=False)\nload(a, strict=True)\n" + "x = 1\n" * 347, None),
    ],
)
def test_violations_are_found_and_allowed_code_has_none(path, source, rule):
    assert list(violations(path, source)) == ([rule] if rule else [])


IN_A_PROCESS = """
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


def in_a_process(commands, heavy):
    """Exit code, stderr, and modules loaded so far after each of some commands, all in one process."""
    words = [sys.executable, "-c", IN_A_PROCESS, json.dumps([commands, heavy])]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_and_mistakes_load_no_large_library():
    starts = [[f"{script}.py"] for script in sorted(SCRIPTS)]
    starts += [["benchmark.py", command] for command in benchmark.COMMANDS]
    cases = [[*start, last] for start in starts for last in ("--help", "--no-such-flag")]
    heavy = ["torch", "transformers", "numpy", "accelerate", "matplotlib", "torchmetrics", "torch_fidelity", "gradio"]
    for words, (code, err, loaded) in zip(cases, in_a_process(cases, heavy), strict=True):
        assert (code, err.count("\n")) == ((0, 0) if words[-1] == "--help" else (2, 1)), (words, err)
        assert loaded == [], words


def test_drawing_loads_no_library_of_training_or_measuring(pipeline_folder, tmp_path):
    words = ["sample.py", "--model", pipeline_folder, "--class-labels", 0, "--output-dir", tmp_path / "out"]
    heavy = ["transformers", "accelerate", "torch_fidelity", "torchmetrics", "datasets", "matplotlib"]
    heavy += ["huggingface_hub", "torchvision"]
    ((code, err, loaded),) = in_a_process([list(map(str, words))], heavy)
    assert (code, loaded) == (0, []), err
    assert (tmp_path / "out" / "grid.png").exists()
