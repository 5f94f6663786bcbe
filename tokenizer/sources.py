"""Images of a split by index: a folder of files, or a data set that the library `datasets` opens.

The training order is a function of (seed, epoch, position), so nothing is streamed. `read` returns a file's path or its
content; `common.images` decodes both.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import ImageFolder

from common.config import InputError
from tokenizer.settings import DataConfig

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
MAX_CLASSES = 1_000_000  # a column of integers beyond it does not hold classes


class FolderSource:
    """Image files in class folders, as listed by torchvision's `ImageFolder`.

    Raises:
        InputError: no such folder, no class folders, or a class without an image.
    """

    def __init__(self, folder: str | Path):
        self.name = str(folder)
        if not Path(folder).is_dir():
            raise InputError(f"{folder} is missing; data_dir must hold {Path(folder).name}/<class>/<images>")
        try:
            listing = ImageFolder(self.name)
        except (FileNotFoundError, RuntimeError) as error:
            raise InputError(f"{folder}: {error}; each class folder needs at least one image") from error
        # a link to a parent folder makes ImageFolder list the same folder many times; the shortest path is kept
        folders = {str(Path(path).parent) for path, _ in listing.samples}
        kept = {os.path.realpath(folder): folder for folder in sorted(folders, key=lambda name: (-len(name), name))}
        listed = set(kept.values())
        samples = [(path, label) for path, label in listing.samples if str(Path(path).parent) in listed]
        self._paths: list[str] = [path for path, _ in samples]
        self.labels = np.array([label for _, label in samples], dtype=np.int64)
        self.classes: list[str] = listing.classes

    def __len__(self) -> int:
        return len(self.labels)

    def image_name(self, index: int) -> str:
        """Path of the file, for messages."""
        return self._paths[index]

    def read(self, index: int) -> Path:
        """Return the path of the file."""
        return Path(self._paths[index])

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of the names, sizes and classes of the files, not of the folder's path."""
        digest = hashlib.sha256()
        for path, label in zip(self._paths, self.labels.tolist(), strict=True):
            # a file name need not be text
            digest.update(f"{Path(path).name} {_size(path)} {label};".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def _size(path: str | Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # a broken link; it is reported when it is read
        return -1


class DatasetSource:
    """One split of a data set; images is a `datasets.Dataset` with one column, of type Image(decode=False)."""

    def __init__(self, name: str, images: Any, labels: NDArray[np.int64], classes: list[str]):
        self.name, self.labels, self.classes, self._images = name, labels, classes, images
        (self._column,) = images.column_names

    def __len__(self) -> int:
        return len(self.labels)

    def image_name(self, index: int) -> str:
        """Data set, split and row, for messages."""
        return f"{self.name} row {index}"

    def read(self, index: int) -> Path | bytes:
        """Return the bytes of the row, or the file that it names; b"" for an empty row."""
        value = self._images[index][self._column] or {"bytes": b""}
        return Path(value["path"]) if value["bytes"] is None and value["path"] else value["bytes"] or b""

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of the classes, labels and sizes in bytes, not of the data's place."""
        import pyarrow.compute as pc

        # lengths follow from the offsets: the images, perhaps 100 GB, are not read
        column = pc.struct_field(self._images.with_format("arrow")[:][self._column], "bytes")
        sizes = pc.fill_null(pc.binary_length(column), -1).to_numpy().astype(np.int64)
        for index in np.flatnonzero(sizes < 0).tolist():
            found = self.read(index)
            sizes[index] = _size(found) if isinstance(found, Path) else 0
        digest = hashlib.sha256(repr((self._column, len(self), self.classes)).encode())
        digest.update(self.labels.tobytes() + sizes.tobytes())
        return digest.hexdigest()[:16]


ImageSource = FolderSource | DatasetSource


def open_source(config: DataConfig, split: Split) -> ImageSource:
    """Open the images of a split.

    Raises:
        InputError: what the configuration names is missing, cannot be loaded, or has no usable images or labels.
    """
    if config.dataset is None:
        return FolderSource(Path(str(config.data_dir)) / split)
    wanted, other = config.train_split, config.val_split
    if split == "val":
        wanted, other = other, wanted
    name, rows = f"{config.dataset}/{wanted}", _load(config, wanted)
    images = _images(rows, config.image_column, name)
    column = config.label_column or next((column for column in ("label", "cls") if column in rows.features), None)
    if column is None:
        return DatasetSource(name, images, np.zeros(len(rows), dtype=np.int64), ["image"])
    labels, classes = _labels(rows, column, name)
    if not classes:  # plain integers: their number follows from both splits
        others, _ = _labels(_load(config, other), column, f"{config.dataset}/{other}")
        classes = [str(i) for i in range(1 + max(int(labels.max()), int(others.max())))]
    return DatasetSource(name, images, labels, classes)


def _load(config: DataConfig, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("--dataset needs the package `datasets`; install channeltok[train]") from error
    name = f"dataset {config.dataset}, split {split},"
    try:
        rows = datasets.load_dataset(str(config.dataset), config.dataset_config, split=split)
    except Exception as error:  # readers of a dozen file formats and a network may raise anything
        raise InputError(
            f"{name} cannot be loaded ({type(error).__name__}: {str(error)[:300]}); give a data set on the hub that "
            "you can reach (`hf auth login` for a gated one) or a local folder"
        ) from error
    if not len(rows):
        raise InputError(f"{name} has no rows; choose another split")
    return rows


def _images(rows: Any, wanted: str | None, name: str) -> Any:
    """The column of images alone, not decoded; bytes, and structs of bytes and path, are images as well."""
    from datasets import Image

    found = [c for c, kind in rows.features.items() if c == wanted or (wanted is None and isinstance(kind, Image))]
    try:
        (column,) = found
        return rows.select_columns(found).cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # ValueError if there is not one column
        kind = f"named {wanted!r}" if wanted else "of type Image"
        columns = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in rows.features.items())
        raise InputError(
            f"{name} needs one column {kind} that holds images; choose it with --image-column; columns: {columns}"
        ) from error


def _labels(rows: Any, column: str, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """The column (rows,) and the names that its type gives to classes; none for plain integers."""
    from datasets import ClassLabel, Value

    kind = rows.features.get(column)
    if not (isinstance(kind, ClassLabel) or (isinstance(kind, Value) and "int" in kind.dtype)):
        raise InputError(f"{name}: column {column!r} is {kind}; classes are integers; choose another --label-column")
    names = list(kind.names) if isinstance(kind, ClassLabel) else []
    # an unsigned number too large to be a class becomes negative here, and so does a missing one
    values = rows.select_columns([column]).with_format("arrow")[:][column].cast("int64", safe=False)
    numbers: NDArray[np.int64] = values.fill_null(-1).to_numpy()
    wrong = np.flatnonzero((numbers < 0) | (numbers >= (len(names) or MAX_CLASSES)))
    if len(wrong):
        raise InputError(
            f"{name}: {len(wrong)} rows have no class in column {column!r}, the first is row {wrong[0]}; allowed are "
            f"0..{(len(names) or MAX_CLASSES) - 1}; choose another split, or another --label-column"
        )
    return numbers, names


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Refuse two splits whose labels mean different classes.

    Raises:
        InputError: the lists of class names differ.
    """
    if train.classes != val.classes:
        raise InputError(f"{train.name} and {val.name} have different classes; they must be the same")
