"""Who may import whom, and what is not in this house: held over the syntax tree of every product file."""

import ast
from pathlib import Path, PurePosixPath

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "tokenizer", "generator")
MAX_LINES = 350
PRODUCT = sorted(
    path.relative_to(REPO).as_posix() for pattern in ("*.py", *(f"{p}/**/*.py" for p in PACKAGES))
    for path in REPO.glob(pattern)
)  # fmt: skip
SCRIPTS = {PurePosixPath(path).stem for path in PRODUCT if "/" not in path} | {"train_tokenizer", "sample"}
COMMAND_LINE = {"argparse", "optparse", "getopt", "click", "typer", "fire", "absl"}


def room(path):
    """The package a file belongs to; "scripts" for those beside the packages."""
    parts = PurePosixPath(path).parts
    return parts[0] if len(parts) > 1 else "scripts"


def dotted(node):
    """`a.b.c` of a name or attribute, otherwise ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def imports(path, tree):
    """Full names of all that is imported anywhere in a file, relative imports resolved."""
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
    """Imported names and dotted names, as far as they can be read off the tree."""
    return [*imports(path, tree), *(dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))]


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def wrong_arrows(path, tree):
    allowed = {"scripts": set(PACKAGES), "common": {"common"}}.get(room(path), {"common", room(path)})
    if path == "generator/pipeline.py":
        allowed = allowed | {"tokenizer"}
    ours = {*PACKAGES, *SCRIPTS, "tests", "oracles", "conftest"}
    roots = [name.split(".")[0] for name in imports(path, tree)]
    return [f"{room(path)} imports {root}" for root in roots if root in ours - allowed]


def command_line_elsewhere(path, tree):
    if path == "common/cli.py":
        return []
    names = [name for name in used(path, tree) if name.split(".")[0] in COMMAND_LINE]
    return names + [name for name in used(path, tree) if name.endswith("HfArgumentParser") or name == "sys.argv"]


def weights_elsewhere(path, tree):
    if path == "common/checkpoint.py":
        return []
    names = [name for name in used(path, tree) if name.split(".")[0] in ("safetensors", "pickle", "dill")]
    return names + [name for name in used(path, tree) if name in ("torch.load", "torch.save")]


def fidelity_elsewhere(path, tree):
    if path == "common/fid.py":
        return []
    return [name for name in imports(path, tree) if name.split(".")[0] == "torch_fidelity"]


def accelerate_elsewhere(path, tree):
    if room(path) == "scripts" or PurePosixPath(path).name == "training.py" or path == "common/processes.py":
        return []
    return [name for name in imports(path, tree) if name.split(".")[0] == "accelerate"]


def prints_in_packages(path, tree):
    return [] if room(path) == "scripts" else ["print(" for call in calls(tree) if dotted(call.func) == "print"]


def getattr_with_default(path, tree):
    return ["getattr with a default" for call in calls(tree) if dotted(call.func) == "getattr" and len(call.args) > 2]


def edits_the_path(path, tree):
    return [name for name in used(path, tree) if name == "sys.path" or name.startswith("sys.path.")]


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


def bare_excepts(path, tree):
    return ["bare except" for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]


def main_in_packages(path, tree):
    if room(path) == "scripts":
        return []
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    return ["__main__" for node in compared if dotted(node.left) == "__name__"]


RULES = [
    wrong_arrows,
    command_line_elsewhere,
    weights_elsewhere,
    fidelity_elsewhere,
    accelerate_elsewhere,
    prints_in_packages,
    getattr_with_default,
    edits_the_path,
    loose_loading,
    bare_excepts,
    main_in_packages,
]


def violations(path, source):
    """Lines like "rule: what" for every rule that a source breaks."""
    tree = ast.parse(source)
    found = [f"{rule.__name__}: {what}" for rule in RULES for what in rule(path, tree)]
    lines = len(source.splitlines())
    return found + ([f"too_long: {lines} lines"] if lines > MAX_LINES else [])


def test_the_product_is_found():
    assert {"train_tokenizer.py", "common/cli.py", "tokenizer/bsq.py", "generator/pipeline.py"} <= set(PRODUCT)
    assert not [path for path in PRODUCT if path.startswith("tests")]


@pytest.mark.parametrize("path", PRODUCT)
def test_every_product_file_keeps_the_rules(path):
    assert violations(path, (REPO / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("tokenizer/a.py", "from generator.config import TokenLayout", "wrong_arrows"),
        ("tokenizer/a.py", "import generator", "wrong_arrows"),
        ("tokenizer/a.py", "from ..generator import config", "wrong_arrows"),
        ("tokenizer/a.py", "def f():\n    import generator.model", "wrong_arrows"),
        ("generator/a.py", "from tokenizer import ChannelTokenizer", "wrong_arrows"),
        ("generator/training.py", "import tokenizer.config as c", "wrong_arrows"),
        ("generator/pipeline.py", "import sample", "wrong_arrows"),
        ("common/a.py", "from tokenizer.bsq import pack_bits", "wrong_arrows"),
        ("common/a.py", "from generator import model", "wrong_arrows"),
        ("common/a.py", "import train_tokenizer", "wrong_arrows"),
        ("extract_tokens.py", "from train_tokenizer import main", "wrong_arrows"),
        ("sample.py", "from tests.oracles import bits", "wrong_arrows"),
        ("sample.py", "import argparse", "command_line_elsewhere"),
        ("tokenizer/a.py", "from argparse import ArgumentParser", "command_line_elsewhere"),
        ("sample.py", "from transformers import HfArgumentParser", "command_line_elsewhere"),
        ("sample.py", "import transformers\np = transformers.HfArgumentParser(())", "command_line_elsewhere"),
        ("sample.py", "import sys\nx = sys.argv[1]", "command_line_elsewhere"),
        ("generator/tokens.py", "from safetensors.torch import save_file", "weights_elsewhere"),
        ("common/training.py", "import safetensors", "weights_elsewhere"),
        ("tokenizer/a.py", "import torch\nx = torch.load('a', weights_only=True)", "weights_elsewhere"),
        ("tokenizer/a.py", "from torch import save", "weights_elsewhere"),
        ("tokenizer/a.py", "import torch\ntorch.save({}, 'a')", "weights_elsewhere"),
        ("common/checkpoints.py", "import pickle", "weights_elsewhere"),
        ("benchmark.py", "import torch_fidelity", "fidelity_elsewhere"),
        ("tokenizer/fid.py", "from torch_fidelity import calculate_metrics", "fidelity_elsewhere"),
        ("tokenizer/losses.py", "from accelerate import Accelerator", "accelerate_elsewhere"),
        ("common/runtime.py", "import accelerate.utils", "accelerate_elsewhere"),
        ("common/a.py", "print('hello')", "prints_in_packages"),
        ("sample.py", "x = getattr(a, 'b', None)", "getattr_with_default"),
        ("sample.py", "import sys\nsys.path.insert(0, '.')", "edits_the_path"),
        ("common/a.py", "from sys import path", "edits_the_path"),
        ("common/a.py", "import sys\nsys.path = []", "edits_the_path"),
        ("common/a.py", "model.load_state_dict(state, strict=False)", "loose_loading"),
        ("common/checkpoint.py", "import torch\ntorch.load('a', weights_only=False)", "loose_loading"),
        ("sample.py", "try:\n    f()\nexcept:\n    pass", "bare_excepts"),
        ("common/a.py", "if __name__ == '__main__':\n    f()", "main_in_packages"),
        ("common/a.py", "x = 1\n" * 351, "too_long"),
    ],
)
def test_every_rule_can_fail(path, source, rule):
    found = violations(path, source)
    assert [line for line in found if line.startswith(f"{rule}: ")]
    assert {line.split(":")[0] for line in found} == {rule}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sample.py", "from common import cli\nfrom generator import model\nimport tokenizer.bsq\nprint('done')"),
        ("sample.py", "if __name__ == '__main__':\n    f()"),
        ("generator/pipeline.py", "from tokenizer import ChannelTokenizer"),
        ("generator/model.py", "from common.errors import InputError\nfrom generator.config import TokenLayout"),
        ("tokenizer/a.py", "from . import bsq\nfrom .bsq import pack_bits\nimport tokenizers\nimport sampler"),
        ("common/cli.py", "import argparse\nimport sys\nfrom transformers import HfArgumentParser\nx = sys.argv"),
        ("common/checkpoint.py", "import safetensors, torch\ntorch.load('a', weights_only=True)"),
        ("common/fid.py", "import torch_fidelity"),
        ("common/training.py", "from accelerate import Accelerator"),
        ("train_ar.py", "from accelerate import Accelerator"),
        ("common/a.py", "getattr(a, 'b')\nzip(a, b, strict=False)\nload(a, strict=True)\nx = 'print(1)'"),
        ("common/a.py", "try:\n    f()\nexcept Exception:\n    pass"),
        ("common/a.py", "x = 1\n" * 350),
    ],
)
def test_what_is_allowed_is_not_refused(path, source):
    assert violations(path, source) == []
