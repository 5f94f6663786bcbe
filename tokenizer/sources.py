"""Where images come from: a folder of files, or a data set of the Hugging Face `datasets` library, by one interface.

The training order is a function of (seed, epoch, position), so every source gives any image by its index;
nothing is streamed. Images come as files or bytes and are decoded by `common.images` alone.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import ImageFolder

from common.errors import InputError
from tokenizer.settings import DataConfig

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
MAX_CLASSES = 1_000_000  # beyond it a column of integers holds something else than classes
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
BINARY = ("binary", "large_binary")


class ImageSource(Protocol):
    """The images of one split, by index; the same order on each start."""

    @property
    def name(self) -> str:
        """What messages call this split."""

    @property
    def classes(self) -> list[str]:
        """A name for each label."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class of an image, in [0, len(classes))."""

    def image_name(self, index: int) -> str:
        """What messages call an image: a path, or a row."""

    def read(self, index: int) -> Path | bytes:
        """A file, or the content of one; not decoded and perhaps damaged."""

    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for the sizes and classes of all images, in order."""


class FolderSource:
    """Image files below a folder, one folder for each class, as torchvision's `ImageFolder` lists them.

    Raises:
        InputError: no such folder, no class folders, or a class without a single image.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder} is missing; data_dir must hold {self.folder.name}/<class>/<images>")
        try:
            listing = ImageFolder(str(folder))
        except (FileNotFoundError, RuntimeError) as error:
            raise InputError(f"{folder}: {error}; each class folder needs at least one image") from error
        self._samples: list[tuple[str, int]] = listing.samples
        self._classes: list[str] = listing.classes

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def classes(self) -> list[str]:
        """The names of the class folders, sorted."""
        return self._classes

    def __len__(self) -> int:
        return len(self._samples)

    def label(self, index: int) -> int:
        """The place of the file's class folder among `classes`."""
        return self._samples[index][1]

    def image_name(self, index: int) -> str:
        """The file's path."""
        return self._samples[index][0]

    def read(self, index: int) -> Path:
        """The file's path."""
        return Path(self._samples[index][0])

    def fingerprint(self) -> str:
        """Stands for the names, sizes and classes of the files; where the folder lies does not matter."""
        digest = hashlib.sha256()
        for path, label in self._samples:
            line = f"{Path(path).name} {_size(path)} {label};"
            digest.update(line.encode(errors="surrogateescape"))  # a file's name need not be text
        return digest.hexdigest()[:16]


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # a broken link; reading it will name and count it
        return -1


class DatasetSource:
    """One split of a data set that `datasets` has opened; made by `open_source`.

    Args:
        name: what messages call it.
        images: a `datasets.Dataset` with one column, which gives bytes, or {"bytes", "path"} of which one may be None.
        labels: (rows,) int64.
        classes: a name for each label.
    """

    def __init__(self, name: str, images: Any, labels: NDArray[np.int64], classes: list[str]):
        self._name, self._images, self._labels, self._classes = name, images, labels, classes
        (self._column,) = images.column_names

    @property
    def name(self) -> str:
        """The data set and its split."""
        return self._name

    @property
    def classes(self) -> list[str]:
        """Those of the label column's type; for plain integers "0" and up; "image" where there is no label."""
        return self._classes

    def __len__(self) -> int:
        return len(self._images)

    def label(self, index: int) -> int:
        """The row's label."""
        return int(self._labels[index])

    def image_name(self, index: int) -> str:
        """The data set, the split and the row."""
        return f"{self._name} row {index}"

    def read(self, index: int) -> Path | bytes:
        """The row's bytes, or the file that it names; an empty row gives no bytes."""
        value = self._images[index][self._column]
        if isinstance(value, Mapping):
            content, path = value["bytes"], value["path"]
            value = Path(path) if content is None and path else content
        return b"" if value is None else value

    def fingerprint(self) -> str:
        """Stands for the rows' sizes in bytes and labels, and the classes; where the data lie does not matter."""
        digest = hashlib.sha256(repr((self._column, len(self), self._classes)).encode())
        digest.update(self._labels.tobytes())
        digest.update(self._sizes().tobytes())
        return digest.hexdigest()[:16]

    def _sizes(self) -> NDArray[np.int64]:
        import pyarrow.compute as pc

        # lengths are read off the offsets: the images themselves, perhaps 100 GB of them, are not touched
        column = self._images.with_format("arrow")[:][self._column]
        plain = column if self._is_binary(column) else pc.struct_field(column, "bytes")
        sizes: NDArray[np.int64] = pc.fill_null(pc.binary_length(plain), -1).to_numpy().astype(np.int64)
        for index in np.flatnonzero(sizes < 0):
            found = self.read(int(index))
            sizes[index] = _size(str(found)) if isinstance(found, Path) else 0
        return sizes

    @staticmethod
    def _is_binary(column: Any) -> bool:
        return str(column.type) in BINARY


def open_source(config: DataConfig, split: Split) -> ImageSource:
    """Open the images of a split.

    Raises:
        InputError: what the configuration names is missing, cannot be loaded, or has no usable images or labels.
    """
    if config.dataset is None:
        return FolderSource(Path(str(config.data_dir)) / split)
    names = {"train": config.train_split, "val": config.val_split}
    name = f"{config.dataset}/{names[split]}"
    rows = _load(config, names[split])
    column = _image_column(rows, config.image_column, name)
    label_column = _label_column(rows, config.label_column, name)
    if label_column is None:
        labels, classes = np.zeros(len(rows), dtype=np.int64), ["image"]
    else:
        labels, classes = _labels(rows, label_column, name)
    if label_column is not None and not classes:  # plain integers: both splits together say how many there are
        other_name = names["val" if split == "train" else "train"]
        others, _ = _labels(_load(config, other_name), label_column, f"{config.dataset}/{other_name}")
        classes = [str(i) for i in range(1 + max(int(labels.max()), int(others.max())))]
    return DatasetSource(name, _undecoded(rows.select_columns([column])), labels, classes)


def _load(config: DataConfig, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("--dataset needs the package `datasets`; install channeltok[train]") from error
    try:
        rows = datasets.load_dataset(str(config.dataset), config.dataset_config, split=split)
    except Exception as error:
        # readers of a dozen file formats and a network lie behind this call: it may raise anything
        raise InputError(
            f"dataset {config.dataset}, split {split}, cannot be loaded "
            f"({type(error).__name__}: {str(error)[:300]}); give a data set on the hub that you can reach "
            "(`hf auth login` for a gated one) or a local folder"
        ) from error
    if not len(rows):
        raise InputError(f"dataset {config.dataset}, split {split}, has no rows; choose another split")
    return rows


def _described(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())


def _image_column(rows: Any, wanted: str | None, name: str) -> str:
    from datasets import Image, Value

    features = rows.features
    found: list[str] = [column for column, kind in features.items() if isinstance(kind, Image)]
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted is None:
        raise InputError(
            f"{name} has {len(found) or 'no'} columns of type Image; choose one with --image-column; "
            f"columns: {_described(features)}"
        )
    if wanted not in features:
        raise InputError(f"{name} has no column {wanted!r}; image_column may be one of {_described(features)}")
    kind = features[wanted]
    binary = isinstance(kind, Value) and kind.dtype in BINARY
    packed = isinstance(kind, Mapping) and {"bytes", "path"} <= kind.keys()
    if not (isinstance(kind, Image) or binary or packed):
        raise InputError(f"{name}: column {wanted!r} holds no images; columns: {_described(features)}")
    return wanted


def _undecoded(images: Any) -> Any:
    from datasets import Image

    (column,) = images.column_names
    return images.cast_column(column, Image(decode=False)) if isinstance(images.features[column], Image) else images


def _label_column(rows: Any, wanted: str | None, name: str) -> str | None:
    from datasets import ClassLabel, Value

    features = rows.features
    if wanted is None:
        wanted = next((column for column in ("label", "cls") if column in features), None)
    if wanted is None:
        return None
    if wanted not in features:
        raise InputError(f"{name} has no column {wanted!r}; label_column may be one of {_described(features)}")
    kind = features[wanted]
    if not (isinstance(kind, ClassLabel) or (isinstance(kind, Value) and kind.dtype in INTEGERS)):
        raise InputError(
            f"{name}: column {wanted!r} is {kind}; classes are a ClassLabel or integers; see --label-column"
        )
    return wanted


def _labels(rows: Any, column: str, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """The column (rows,) and the names that its type gives to classes; none for plain integers."""
    from datasets import ClassLabel

    if column not in rows.features:
        raise InputError(f"{name} has no column {column!r}, unlike the other split; choose another --label-column")
    kind = rows.features[column]
    names = list(kind.names) if isinstance(kind, ClassLabel) else []
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    # an unsigned number too large to be a class turns negative here, and a missing one is made so
    numbers = values.cast("int64", safe=False).fill_null(-1).to_numpy()
    wrong = np.flatnonzero((numbers < 0) | (numbers >= (len(names) or MAX_CLASSES)))
    if len(wrong):
        found = values[int(wrong[0])]
        raise InputError(
            f"{name}: {len(wrong)} rows have no class in column {column!r} (row {wrong[0]}: {found}); allowed are "
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
