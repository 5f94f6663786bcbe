"""The documentation: its links lead somewhere, and the blocks marked <!-- run --> run as they are written."""

import re
import shlex
from contextlib import chdir
from pathlib import Path

import pytest
from conftest import REPO, ScriptRunner

DOCUMENTS = [REPO / "README.md", *sorted(REPO.glob("docs/*.md"))]
BLOCK = re.compile(r"<!-- run -->\n```(\w*)\n(.*?)```", re.S)
BLOCKS = [(path, *found) for path in DOCUMENTS for found in BLOCK.findall(path.read_text())]


def headings(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in headings(path.read_text()), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    """Paths of the repository that are named in backquotes: with a folder and an ending, or in a known folder."""
    if document.name == "lab.md":  # names files of earlier versions
        return
    folders = "common|configs|docs|evaluation|generator|page|refiner|tests|tokenizer|training|weights"
    for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", document.read_text()):
        assert (REPO / name).exists(), name


@pytest.mark.parametrize(("document", "language", "text"), BLOCKS, ids=lambda value: getattr(value, "name", ""))
def test_marked_blocks_run(document: Path, language: str, text: str, scripts: ScriptRunner, tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(REPO / "weights")
    if language == "python":
        with chdir(tmp_path):
            exec(compile(text, document.name, "exec"), {})
        return
    for line in text.strip().splitlines():
        program, script, *words = shlex.split(line, comments=True)
        assert program == "python"
        done = scripts(script, *words, cwd=tmp_path)
        assert done.code == 0, (line, done.err)


def test_some_blocks_are_marked() -> None:
    assert {path.name for path, *_ in BLOCKS} >= {"README.md", "anytime.md"}
    assert {language for _, language, _ in BLOCKS} == {"", "python"}
