"""docs/serving.md: what it shows of transformers runs as it stands, with the model that comes along."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from PIL import Image


def test_the_code_for_transformers_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPO / "docs" / "serving.md").read_text()
    drawing, pictures = re.findall(r"```python\n(.*?)```", text.split("## vLLM")[0], flags=re.DOTALL)
    (tmp_path / "weights").symlink_to(REPO / "weights")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(drawing, names)
    assert names["tokens"].shape == (2, 256)
    assert 0 <= int(names["tokens"].min()) <= int(names["tokens"].max()) < 4096
    exec(pictures, names)
    with Image.open("out.png") as picture:
        assert picture.size == (64, 64)
        assert len(picture.convert("L").getcolors() or []) > 9
