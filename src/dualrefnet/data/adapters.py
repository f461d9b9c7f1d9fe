"""Find a data set on disk and read it through its adapter: one function for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from dualrefnet.data.schema import DatasetSchema
from dualrefnet.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
DATA_VARIABLE = "DUALREFNET_DATA"


@dataclass(frozen=True)
class Dataset:
    """A data set as its adapter read it.

    Attributes:
        table: the lesion table, one row an image, in the order of the published file; `image_path` is None for a row
            whose image isn't on this disk.
        schema: what the columns mean.
        root: the folder that was read.
        remarks: what the user should know of the reading, one sentence each.
        other_columns: the published columns that are neither ids nor label nor metadata field, as text, with the index
            of
            `table`: never features, but an audit looks at them.
    """

    table: pd.DataFrame
    schema: DatasetSchema
    root: Path
    remarks: list[str] = field(default_factory=list)
    other_columns: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def with_image(self) -> pd.DataFrame:
        """The rows whose image is on this disk."""
        return self.table[self.table["image_path"].notna()]


def adapters() -> dict[str, Callable[[Path, Path | None], Dataset]]:
    """Return the adapters by name; each takes (root, description file or None)."""
    # Imported here: each adapter imports this module for `Dataset`.
    from dualrefnet.data import csv_table, isic_2019, pad_ufes_20
    from dualrefnet.data import synthetic as sample

    return {
        "pad_ufes_20": lambda root, description: pad_ufes_20.load(root),
        "isic_2019": lambda root, description: isic_2019.load(root),
        "sample": lambda root, description: sample.load(root),
        "csv_table": csv_table.load,
    }


def load_dataset(name: str, root: Path | str | None = None, description: Path | str | None = None) -> Dataset:
    """Read a data set.

    Args:
        name: the adapter's name.
        root: the data set's folder; None: the folder of that name under `$DUALREFNET_DATA`.
        description: for `csv_table`, the YAML file that describes the columns.

    Raises:
        DataError: the adapter is unknown, the folder or a file in it is missing, or the table is not what it must be.
    """
    known = adapters()
    if name not in known:
        raise DataError(f"no data set adapter is called {name!r}; there are: {', '.join(known)}")
    return known[name](find_root(name, root), Path(description) if description else None)


def find_root(name: str, root: Path | str | None = None) -> Path:
    """Return the folder of a data set; see `load_dataset`.

    Raises:
        DataError: no folder was given, or it doesn't exist.
    """
    if root is None:
        base = os.environ.get(DATA_VARIABLE)
        if not base:
            raise DataError(
                f"where is {name}? Give its folder (--root DIR, or data.root=DIR for a recipe), "
                f"or set {DATA_VARIABLE} to the folder that holds {name}/"
            )
        root = Path(base) / name
    root = Path(root).expanduser()
    if not root.is_dir():
        hint = (
            f"; `dualrefnet sample {root}` draws it"
            if name == "sample"
            else f"; `dualrefnet fetch {name} --root {root}` downloads it"
        )
        raise DataError(f"there is no folder {root}{hint if name != 'csv_table' else ''}")
    return root


def other_columns(published: pd.DataFrame, known: Iterable[str]) -> pd.DataFrame:
    """Return the columns of a published table, all text, that aren't among the `known` ones; index 0..n-1."""
    return published.drop(columns=[name for name in known if name in published.columns]).reset_index(drop=True)


def index_images(folders: Iterable[Path]) -> dict[str, Path]:
    """Map the stem of every image file in `folders` (not below them) to its path.

    Raises:
        DataError: two files have one stem, so that it isn't clear which of them a row means.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            # A folder, or a link that leads nowhere, is no image.
            if suffix.lower() not in IMAGE_SUFFIXES or entry.name.startswith(".") or not entry.is_file():
                continue
            if stem in found:
                raise DataError(f"two images are called {stem}: {found[stem]} and {entry.path}; keep one of them")
            found[stem] = Path(entry.path)
    return found


def read_csv(path: Path, **options: object) -> pd.DataFrame:
    """Read a CSV of the user's, with an error that says what is wrong with it.

    Raises:
        DataError: the file is missing, unreadable, empty, not UTF-8 text or not a table.
    """
    try:
        return pd.read_csv(path, **options)  # type: ignore[call-overload, no-any-return]
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} can't be read as CSV: {str(error).strip().splitlines()[-1]}") from None
