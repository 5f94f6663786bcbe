import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import checkpoint, cli
from common.checkpoint import (
    fingerprint,
    folder_written_whole,
    load_foreign_state,
    load_tensors,
    read_json,
    save_pretrained_whole,
    save_tensors,
    write_text,
    written_whole,
)
from common.errors import InputError
from tokenizer import ChannelTokenizer


def everything(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_file_that_fails_midway_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), written_whole(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert everything(tmp_path) == {"file": b"old"}


def test_a_new_file_that_fails_midway_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="stop"), written_whole(tmp_path / "deep" / "file") as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert everything(tmp_path / "deep") == {}


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert not path.exists()
    assert everything(tmp_path) == {"file": b"new"}


def record_order(monkeypatch):
    """What is flushed and renamed, in order, by inode."""
    order = []

    def fsync(handle, real=os.fsync):
        order.append(("sync", os.fstat(handle).st_ino))
        real(handle)

    def renaming(real):
        def rename(self, target):
            order.append(("rename", self.stat().st_ino))
            return real(self, target)

        return rename

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renaming(Path.replace))
    monkeypatch.setattr(Path, "rename", renaming(Path.rename))
    return order


def test_a_file_is_on_disk_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    order = record_order(monkeypatch)
    write_text(tmp_path / "file", "text")
    inode = (tmp_path / "file").stat().st_ino
    assert order == [("sync", inode), ("rename", inode), ("sync", tmp_path.stat().st_ino)]


def test_a_folders_files_are_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order = record_order(monkeypatch)
    with folder_written_whole(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        (temporary / "b").write_text("b")
        assert not (tmp_path / "folder").exists()
    assert everything(tmp_path) == {"folder": False, "folder/sub": False, "folder/sub/a": b"a", "folder/b": b"b"}
    renamed = order.index(("rename", (tmp_path / "folder").stat().st_ino))
    for name in ("sub/a", "b"):
        assert order.index(("sync", (tmp_path / "folder" / name).stat().st_ino)) < renamed


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_midway_leaves_nothing(tmp_path, error):
    with pytest.raises(error), folder_written_whole(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("a")
        raise error
    assert everything(tmp_path) == {}


def test_a_folder_that_is_there_already_is_kept(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(OSError, match="folder"), folder_written_whole(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert everything(tmp_path) == {"folder": False, "folder/old": b"old"}


def test_a_written_folder_can_be_read_by_others(tmp_path):
    with folder_written_whole(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("a")
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_saved_weights_replace_older_ones_weights_last(tmp_path, tiny_tokenizer, monkeypatch):
    renamed = []

    def replace(self, target, real=Path.replace):
        renamed.append(Path(target).name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for _ in range(2):
        save_pretrained_whole(tiny_tokenizer, tmp_path)
    assert sorted(everything(tmp_path)) == ["config.json", "model.safetensors"]
    assert renamed == ["config.json", "model.safetensors"] * 2
    assert fingerprint(ChannelTokenizer.from_pretrained(tmp_path)) == fingerprint(tiny_tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_changes_with_one_bit(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(dtype)
    before = fingerprint(model)
    assert len(before) == 16
    assert int(before, 16) >= 0
    for parameter in model.parameters():
        bits = parameter.data.view(torch.uint8)
        bits.flatten()[-1] ^= 1
        assert fingerprint(model) != before
        bits.flatten()[-1] ^= 1
        assert fingerprint(model) == before


def test_fingerprint_tells_names_shapes_types_and_the_sign_of_zero_apart():
    def of(**tensors):
        module = torch.nn.Module()
        for name, value in tensors.items():
            module.register_buffer(name, value)
        return fingerprint(module)

    found = [
        of(a=torch.zeros(4)),
        of(b=torch.zeros(4)),
        of(a=torch.zeros(2, 2)),
        of(a=torch.zeros(4, dtype=torch.int32)),
        of(a=-torch.zeros(4)),
        of(a=torch.zeros(2), b=torch.zeros(2)),
    ]
    assert len(set(found)) == len(found)
    assert of(a=torch.zeros(2, 3).T) == of(a=torch.zeros(3, 2))


def refusal(action, *arguments):
    with pytest.raises(InputError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_foreign_weights_of_each_ending(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_tensors(tmp_path / "a.safetensors", state)
    for ending in ("ckpt", "pt", "pth"):
        torch.save(state, tmp_path / f"a.{ending}")
    for ending in ("safetensors", "ckpt", "pt", "pth"):
        assert torch.equal(load_foreign_state(tmp_path / f"a.{ending}")["a"], state["a"])


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors", "a.pt", "a"])
def test_foreign_weights_that_are_missing_or_of_another_ending_are_refused(tmp_path, name):
    assert str(tmp_path / name) in refusal(load_foreign_state, tmp_path / name)


def test_damaged_foreign_weights_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for i, damaged in enumerate((b"", b"no checkpoint", content[: len(content) // 2], content[:-30])):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(damaged)
        assert str(path) in refusal(load_foreign_state, path)


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {"a": torch.zeros(2), "epoch": 3}, {"a": {}}])
def test_what_is_no_dictionary_of_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert "a.pt" in refusal(load_foreign_state, tmp_path / "a.pt")


def test_an_entry_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "a.pt")
    assert load_foreign_state(tmp_path / "a.pt", "model").keys() == {"a"}
    assert "model, epoch" in refusal(load_foreign_state, tmp_path / "a.pt", "ema")
    assert "model, epoch" in refusal(load_foreign_state, tmp_path / "a.pt")
    assert "'epoch'" in refusal(load_foreign_state, tmp_path / "a.pt", "epoch")


def test_damaged_tensors_and_json_are_refused(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(100)})
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    assert "a.safetensors" in refusal(load_tensors, tmp_path / "a.safetensors")
    assert "b.safetensors" in refusal(load_tensors, tmp_path / "b.safetensors")
    for content in (b"", b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(content)
        assert "a.json" in refusal(read_json, tmp_path / "a.json")
    assert "b.json" in refusal(read_json, tmp_path / "b.json")


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A folder with 64 KiB of room; where nothing can be mounted, a flush that reports a full disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False
    if os.name == "posix" and os.geteuid() == 0:
        try:
            command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            mounted = False
    if not mounted:

        def fsync(handle):
            if os.fstat(handle).st_size > 50_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def complaint(action, capsys):
    """What a script that runs `action` writes to stderr; it must end with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        cli.run(action)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "tensors", "folder"])
def test_a_full_disk_is_one_clean_line_and_keeps_what_was_there(full_disk, capsys, kind):
    save_tensors(full_disk / "old.safetensors", {"a": torch.arange(10.0)})
    large = {"a": torch.zeros(100_000)}

    def fill():
        if kind == "text":
            write_text(full_disk / "old.safetensors", "x" * 400_000)
        elif kind == "tensors":
            save_tensors(full_disk / "old.safetensors", large)
        else:
            with folder_written_whole(full_disk / "folder") as temporary:
                (temporary / "small").write_text("small")
                save_tensors(temporary / "large.safetensors", large)

    line = complaint(fill, capsys)
    assert line.count("\n") == 1
    assert "No space left" in line
    assert [path.name for path in full_disk.iterdir()] == ["old.safetensors"]
    assert torch.equal(load_file(full_disk / "old.safetensors")["a"], torch.arange(10.0))


def test_a_full_disk_while_a_model_is_saved_keeps_the_old_model(full_disk, capsys, tiny_tokenizer):
    (full_disk / "model").mkdir()
    (full_disk / "model" / "model.safetensors").write_bytes(b"old")
    line = complaint(lambda: save_pretrained_whole(tiny_tokenizer, full_disk / "model"), capsys)
    assert line.splitlines()[-1].count("No space left") == 1
    assert "Traceback" not in line
    assert (full_disk / "model" / "model.safetensors").read_bytes() == b"old"
    assert not [path for path in (full_disk / "model").iterdir() if path.name.startswith(".")]


def test_saved_weights_can_be_read_by_other_users(tmp_path, tiny_tokenizer):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    save_pretrained_whole(tiny_tokenizer, tmp_path / "model")
    for path in tmp_path.rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644
