"""The rows that an audit looks at: those of a split, with all that is known of them, in the split's order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.adapters import Dataset
from dualrefnet.data.schema import DatasetSchema, groups


@dataclass(frozen=True)
class AuditedRows:
    """Rows of a data set and their sides.

    Attributes:
        table: (N rows) of the lesion table, index 0..N-1.
        others: (N rows) the published columns that aren't features.
        schema: what the columns mean.
        classes: the classes that have a row.
        malignant: those of them that are cancer; empty if that would be none or all.
        labels: (N,) indices into `classes`.
        groups: (N,) the patient (of ISIC-2019: lesion) of every row.
        sides: (N,) train, val or test.
    """

    table: pd.DataFrame
    others: pd.DataFrame
    schema: DatasetSchema
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.object_]
    sides: NDArray[np.object_]

    @classmethod
    def of(cls, dataset: Dataset, split: pd.DataFrame) -> AuditedRows:
        """Take the rows of a split; labels and patients are those of the data set."""
        places = pd.Series(dataset.table.index, index=dataset.table["image_id"]).loc[split["image_id"]]
        table = dataset.table.loc[places].reset_index(drop=True)
        others = dataset.other_columns.reindex(places).reset_index(drop=True)
        classes = tuple(label for label in dataset.schema.classes if (table["label"] == label).any())
        malignant = tuple(label for label in classes if label in dataset.schema.malignant)
        labels = np.array([classes.index(label) for label in table["label"]], dtype=np.int64)
        return cls(
            table, others, dataset.schema, classes, malignant if len(malignant) < len(classes) else (), labels,
            groups(table, dataset.schema).to_numpy(dtype=object), split["split"].to_numpy(dtype=object),
        )  # fmt: skip

    @property
    def is_malignant(self) -> NDArray[np.bool_]:
        """(N,) whether the row is a cancer."""
        malignant: NDArray[np.bool_] = np.isin(self.classes, self.malignant)[self.labels]
        return malignant

    @property
    def test(self) -> NDArray[np.bool_]:
        """(N,) whether the row is on the test side."""
        chosen: NDArray[np.bool_] = self.sides == "test"
        return chosen
