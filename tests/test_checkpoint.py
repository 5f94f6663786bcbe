import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import checkpoint, cli
from common.checkpoint import fingerprint, load_foreign_state, load_tensors, save_tensors
from common.config import InputError
from common.files import folder_written_whole, read_json, write_text, written_whole
from tokenizer import ChannelTokenizer


def everything(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new", "deep/new"):
        with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / name) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt
    assert everything(tmp_path) == {"old": b"old", "deep": False}


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


def test_a_file_is_flushed_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    order = record_order(monkeypatch)
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert not (tmp_path / "file").exists()
    assert everything(tmp_path) == {"file": b"new"}
    inode = (tmp_path / "file").stat().st_ino
    assert order == [("sync", inode), ("rename", inode), ("sync", tmp_path.stat().st_ino)]


def test_the_files_of_a_folder_are_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    order = record_order(monkeypatch)
    with folder_written_whole(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        (temporary / "b").write_text("b")
        assert not (tmp_path / "folder").exists()
    assert everything(tmp_path) == {"folder": False, "folder/sub": False, "folder/sub/a": b"a", "folder/b": b"b"}
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    renamed = order.index(("rename", (tmp_path / "folder").stat().st_ino))
    for name in ("sub/a", "b"):
        assert order.index(("sync", (tmp_path / "folder" / name).stat().st_ino)) < renamed


def test_a_folder_that_fails_or_exists_changes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_written_whole(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("a")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(OSError, match="folder"), folder_written_whole(tmp_path / "folder") as temporary:
        (temporary / "new").write_text("new")
    assert everything(tmp_path) == {"folder": False, "folder/old": b"old"}


def test_a_saved_model_replaces_an_older_one(tmp_path, tiny_tokenizer):
    for _ in range(2):
        tiny_tokenizer.save_pretrained(tmp_path)
    assert sorted(everything(tmp_path)) == ["config.json", "model.safetensors"]
    assert fingerprint(ChannelTokenizer.from_pretrained(tmp_path)) == fingerprint(tiny_tokenizer)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def fingerprint_of(**tensors):
    module = torch.nn.Module()
    for name, value in tensors.items():
        module.register_buffer(name, value)
    return fingerprint(module)


def test_fingerprints_differ_by_one_bit_names_shapes_types_and_the_sign_of_zero():
    one_bit = torch.zeros(4, dtype=torch.int32)
    one_bit[-1] = 1
    zeros = [torch.zeros(4), -torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), one_bit]
    found = [*(fingerprint_of(a=value) for value in zeros), fingerprint_of(b=torch.zeros(4))]
    found.append(fingerprint_of(a=torch.zeros(2), b=torch.zeros(2)))
    assert len(set(found)) == len(found)
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in found)
    assert fingerprint_of(a=torch.zeros(2, 3).T) == fingerprint_of(a=torch.zeros(3, 2))


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
    for name in ("a.bin", "a", "b.safetensors", "b.pt"):
        assert str(tmp_path / name) in refusal(load_foreign_state, tmp_path / name)


def test_foreign_files_that_are_damaged_or_hold_no_dictionary_of_weights_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": {"a": torch.zeros(1000)}, "epoch": 3}, path)
    assert load_foreign_state(path, "model").keys() == {"a"}
    for key in ("ema", None, "epoch"):
        assert "model, epoch" in refusal(load_foreign_state, path, key)
    content = path.read_bytes()
    for damaged in (b"", b"no checkpoint", content[: len(content) // 2], content[:-30]):
        path.write_bytes(damaged)
        assert str(path) in refusal(load_foreign_state, path)
    for other in (torch.zeros(2), [torch.zeros(2)], {"a": {}}):
        torch.save(other, path)
        assert str(path) in refusal(load_foreign_state, path)


class Payload:
    """Pickled as a call that creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_never_run(tmp_path, zipped):
    target, path = tmp_path / "executed", tmp_path / "code.pt"
    content = {"state_dict": {"a": torch.zeros(1)}, "extra": Payload(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "was not opened" in refusal(load_foreign_state, path, "state_dict")
    assert not target.exists()
    torch.load(path, weights_only=False)  # noqa: TID251 - where a file is trusted, the code does run
    assert target.exists()


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
def full_disk(tmp_path):
    """A folder in which no file becomes larger than 50 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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

    with pytest.raises(SystemExit) as caught:
        cli.run(fill)
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "File too large" in line
    assert [path.name for path in full_disk.iterdir()] == ["old.safetensors"]
    assert torch.equal(load_file(full_disk / "old.safetensors")["a"], torch.arange(10.0))
