"""Find a data set on disk and read it through its adapter: one function for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dualrefnet.data import csv_table, isic_2019, pad_ufes_20, synthetic
from dualrefnet.data.schema import Dataset
from dualrefnet.errors import DataError

DATA_VARIABLE = "DUALREFNET_DATA"

# Name -> what reads (root, description file or None).
ADAPTERS: dict[str, Callable[[Path, Path | None], Dataset]] = {
    "pad_ufes_20": lambda root, _: pad_ufes_20.load(root),
    "isic_2019": lambda root, _: isic_2019.load(root),
    "sample": lambda root, _: pad_ufes_20.load(root, synthetic.SCHEMA),
    "csv_table": csv_table.load,
}
SCHEMAS = {schema.name: schema for schema in (pad_ufes_20.SCHEMA, isic_2019.SCHEMA, synthetic.SCHEMA)}


def load_dataset(name: str, root: Path | str | None = None, description: Path | str | None = None) -> Dataset:
    """Read a data set.

    Args:
        name: the adapter's name.
        root: the data set's folder; None: the folder of that name under `$DUALREFNET_DATA`.
        description: for `csv_table`, the YAML file that describes the columns.

    Raises:
        DataError: the adapter is unknown, the folder or a file in it is missing, or the table is not what it must be.
    """
    folder = find_root(name, root)
    return ADAPTERS[name](folder, Path(description) if description else None)


def find_root(name: str, root: Path | str | None = None) -> Path:
    """Return the folder of a data set, which must be there; see `load_dataset`."""
    if name not in ADAPTERS:
        raise DataError(f"no data set adapter is called {name!r}; there are: {', '.join(ADAPTERS)}")
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
        hint = f"; `dualrefnet fetch {name} --root {root}` downloads it"
        hints = {"sample": f"; `dualrefnet sample {root}` makes it", "csv_table": ""}
        raise DataError(f"there is no folder {root}{hints.get(name, hint)}")
    return root
