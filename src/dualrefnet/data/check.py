"""What an examination of data says: one finding a question, each with a verdict."""

# also: Images that are the same bytes: under one label a repetition, under two a wrong label.
# also: Say what is wrong with a data set before anybody trains on it.

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from dualrefnet.data import csv_table, isic_2019, pad_ufes_20
from dualrefnet.data.adapters import IMAGE_SUFFIXES, Dataset, index_images, load_dataset
from dualrefnet.data.images import MAX_BYTES, decode_image
from dualrefnet.data.schema import BOOLEAN_VALUES, MetadataField
from dualrefnet.errors import ImageError

Level = Literal["PASS", "WARN", "FAIL"]


MAX_EXAMPLES = 10


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        level: PASS; WARN: known and worth knowing; FAIL: mend it before training.
        check: short id, the same in every release.
        message: one sentence for people.
        examples: up to ten ids.
        count: how many rows, images or values the finding is about.
    """

    level: Level
    check: str
    message: str
    examples: tuple[str, ...] = ()
    count: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the finding as values that JSON knows."""
        return {**asdict(self), "examples": list(self.examples)}


def found_or_pass(level: Level, check: str, found: list[str], what: str, nothing: str) -> Finding:
    """Return a finding of `level` that says `what` of the ids `found`, or a PASS that says `nothing` if there are
    none.
    """
    if not found:
        return Finding("PASS", check, nothing)
    return Finding(level, check, f"{what}: {len(found):,}", tuple(found[:MAX_EXAMPLES]), len(found))


def identical_images(images: Iterable[tuple[str, str, str]]) -> Iterator[Finding]:
    """Say which images are identical, those of different labels first.

    Args:
        images: id, label and hash of the bytes (empty: unknown) of every image.
    """
    twins: dict[str, list[tuple[str, str]]] = {}
    for image_id, label, sha256 in images:
        if sha256:
            twins.setdefault(sha256, []).append((image_id, label))
    unlike, alike = [], []
    for group in twins.values():
        if len({label for _, label in group}) > 1:
            unlike.append(" = ".join(f"{image_id} ({label})" for image_id, label in group))
        elif len(group) > 1:
            alike.append(" = ".join(image_id for image_id, _ in group))
    what = "byte-identical images under different labels (at least one label is wrong), groups"
    yield found_or_pass("WARN", "identical_other_label", unlike, what, "no images of different labels are identical")
    what = "byte-identical images under one label (they may stand on both sides of a split), groups"
    yield found_or_pass("WARN", "identical_same_label", alike, what, "no images of one label are identical")


TINY_SIDE = 64


# Pacheco et al. 2020, table 2; the ground truth of the ISIC 2019 challenge.
OFFICIAL_CLASS_COUNTS = {
    "pad_ufes_20": {"ACK": 730, "BCC": 845, "MEL": 52, "NEV": 244, "SCC": 192, "SEK": 235},
    "isic_2019": {"MEL": 4522, "NV": 12875, "BCC": 3323, "AK": 867, "BKL": 2624, "DF": 239, "VASC": 253, "SCC": 628},
}


@dataclass(frozen=True)
class CheckReport:
    """What was found in one data set.

    Attributes:
        dataset: the adapter's name.
        root: the folder that was read.
        findings: in the order of the checks.
    """

    dataset: str
    root: Path
    findings: list[Finding]

    @property
    def failed(self) -> bool:
        """Whether a finding is FAIL."""
        return any(finding.level == "FAIL" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the report as values that JSON knows."""
        findings = [finding.to_json() for finding in self.findings]
        return {"dataset": self.dataset, "root": str(self.root), "failed": self.failed, "findings": findings}


class _ImageFile(NamedTuple):
    """What reading one image file showed: the hash of its bytes, its shorter side, or why it can't be decoded."""

    image_id: str
    label: str
    sha256: str
    side: int
    error: str | None


def check_dataset(
    name: str,
    root: Path | None,
    description: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check the table, the metadata and every image of a data set; nothing is written.

    Args:
        name: the adapter's name.
        root: the data set's folder; None: the folder of that name under `$DUALREFNET_DATA`.
        description: for `csv_table`, the YAML file that describes the columns.
        workers: threads that read images; None: one a core, at most 16.
        progress: called after each image with the number done and the number of images.

    Raises:
        DataError: the table can't be read at all; see `dualrefnet.data.adapters.load_dataset`.
    """
    dataset = load_dataset(name, root, description)
    findings = [
        *_rows(dataset),
        *_patients(dataset),
        *_metadata(dataset),
        *_missing_images(dataset, _image_files(name, dataset, description)),
        *_images(_read_images(dataset, workers, progress)),
    ]
    return CheckReport(name, dataset.root, findings)


def _rows(dataset: Dataset) -> Iterator[Finding]:
    rows, official = len(dataset.table), dataset.schema.official_rows
    if official is None or rows == official:
        yield Finding("PASS", "rows", f"{rows:,} rows{'' if official is None else ', as published'}", count=rows)
    else:
        yield Finding(
            "FAIL", "rows", f"{rows:,} rows where {official:,} were published; get the metadata again", count=rows
        )
    counts = {label: int((dataset.table["label"] == label).sum()) for label in dataset.schema.classes}
    said = ", ".join(f"{label} {count:,}" for label, count in counts.items())
    published = OFFICIAL_CLASS_COUNTS.get(dataset.schema.name, counts)
    wrong = [
        f"{label} ({published[label]:,} published)" for label, count in counts.items() if count != published[label]
    ]
    empty = [label for label, count in counts.items() if count == 0]
    if wrong:
        yield found_or_pass(
            "FAIL", "classes", wrong, f"rows a class are {said}; classes that differ from the publication", said
        )
    else:
        yield found_or_pass(
            "FAIL", "classes", empty, "classes without a row (take them out of the classes)", f"rows a class: {said}"
        )


def _patients(dataset: Dataset) -> Iterator[Finding]:
    table = dataset.table
    unnamed = table.loc[table["patient_id"].isna(), "image_id"].tolist()
    if len(unnamed) == len(table):
        message = "no patient column: photographs of one person may stand on both sides of a split"
        yield Finding("WARN", "patients", message, count=len(unnamed))
    else:
        message = f"{table['patient_id'].nunique():,} patients, named in every row"
        yield found_or_pass(
            "WARN", "patients", unnamed, "rows without a patient (each counts as a patient of its own)", message
        )
    if dataset.schema.name in ("pad_ufes_20", "sample"):
        # In the lesion table the patient stands before each of these ids, which makes them unique.
        table = pad_ufes_20.read_raw(dataset.root)
    if table["patient_id"].notna().any() and table["lesion_id"].notna().any():
        owners = table.groupby("lesion_id")["patient_id"].nunique()
        shared = [str(lesion) for lesion in owners.index[owners > 1]]
        what = "lesion ids used by several patients (a lesion id alone is no key)"
        yield found_or_pass("WARN", "shared_lesions", shared, what, "no lesion id is shared by patients")


def _metadata(dataset: Dataset) -> Iterator[Finding]:
    strange = [finding for field in dataset.schema.fields for finding in _strange_values(dataset.table, field)]
    yield from strange
    if not any(finding.check == "unknown_codes" for finding in strange):
        yield Finding("PASS", "unknown_codes", "every value is one that its field knows")
    # The only remarks that are about values name the field first.
    names = tuple(f"{field.name}: " for field in dataset.schema.fields)
    for remark in dataset.remarks:
        if remark.startswith(names):
            yield Finding("WARN", "numbers", remark)
    silent = []
    total = 0
    for field in dataset.schema.fields:
        values = dataset.table[field.name]
        counts = {
            "": int(values.isna().sum()),
            **{f" {code}": int((values == code).sum()) for code in field.missing_codes},
        }
        total += sum(counts.values())
        if any(counts.values()):
            silent.append(f"{field.name} {' + '.join(f'{count:,}{code}' for code, count in counts.items() if count)}")
    if dataset.schema.fields:
        said = f"missing cells: {', '.join(silent)}" if silent else "no metadata cell is missing"
        yield Finding("PASS", "missing_metadata", said, count=total)


def _strange_values(table: pd.DataFrame, field: MetadataField) -> Iterator[Finding]:
    values, ids = table[field.name], table["image_id"]
    if field.kind == "numeric":
        return
    alias = values.isin(field.aliases)
    if alias.any():
        used = ", ".join(f"{value} means {field.aliases[value]}" for value in _words(values[alias]))
        yield found_or_pass("WARN", "aliases", ids[alias].tolist(), f"{field.name}: {used}; rows", "")
    legal = BOOLEAN_VALUES if field.kind == "boolean" else field.categories
    unknown = values.notna() & ~values.isin([*legal, *field.missing_codes]) & ~alias
    # Without categories of its own a field learns them from the training rows, and nothing is unknown.
    if not legal or not unknown.any():
        return
    # A number in the wrong column may be a date of birth or a record number: it isn't printed.
    words = [word[:30] for word in _words(values[unknown]) if not any(character.isdigit() for character in word)]
    named = f" ({', '.join(words[:MAX_EXAMPLES])})" if field.kind == "categorical" and words else ""
    known = "True, False" if field.kind == "boolean" else "a category"
    what = f"{field.name}: values that aren't {known} or a missing code{named}"
    yield found_or_pass("WARN", "unknown_codes", ids[unknown].tolist(), what, "")


def _words(values: pd.Series) -> list[str]:
    """Return the different values, the most frequent first."""
    return [str(value) for value in values.value_counts().index]


def _image_files(name: str, dataset: Dataset, description: Path | None) -> dict[str, str]:
    """Map the id of every image file in the data set's image folders to its path."""
    if name == "csv_table":
        told = csv_table.read_description(description or dataset.root / csv_table.DEFAULT_DESCRIPTION)
        folder = (dataset.root / told.images).resolve()
        files = sorted(
            file for file in folder.rglob("[!.]*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        )
        return {file.relative_to(folder).as_posix(): str(file) for file in files}
    folders = isic_2019.image_folders if name == "isic_2019" else pad_ufes_20.image_folders
    return {stem: str(path) for stem, path in index_images(folders(dataset.root)).items()}


def _missing_images(dataset: Dataset, files: dict[str, str]) -> Iterator[Finding]:
    absent = dataset.table.loc[dataset.table["image_path"].isna(), "image_id"].tolist()
    what = "rows without an image (methods that read images leave them out)"
    yield found_or_pass("WARN", "rows_without_image", absent, what, "every row has its image")
    used = set(dataset.with_image["image_path"])
    spare = [image_id for image_id, path in files.items() if path not in used]
    what = "image files that belong to no row (never read)"
    yield found_or_pass("WARN", "images_without_row", spare, what, "every image file belongs to a row")


def _read_images(
    dataset: Dataset, workers: int | None, progress: Callable[[int, int], None] | None
) -> list[_ImageFile]:
    """Decode every image once; of each only its hash and size are kept, so memory doesn't grow with the pictures."""
    table = dataset.with_image
    rows = list(zip(table["image_id"], table["label"], table["image_path"], strict=True))
    results = []
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        try:
            for done, result in enumerate(pool.map(_read_image, rows), start=1):
                results.append(result)
                if progress is not None:
                    progress(done, len(rows))
        except BaseException:
            # Without this, Ctrl-C would wait until all other images are decoded.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _read_image(row: tuple[str, str, str]) -> _ImageFile:
    image_id, label, path = row
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        return _ImageFile(image_id, label, "", 0, str(error.strerror))
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        height, width, _ = decode_image(data).shape
    except ImageError as error:
        return _ImageFile(image_id, label, sha256, 0, str(error))
    return _ImageFile(image_id, label, sha256, min(height, width), None)


def _images(images: list[_ImageFile]) -> Iterator[Finding]:
    broken = [image for image in images if image.error is not None]
    what = f"images that can't be decoded, such as: {broken[0].error}" if broken else ""
    yield found_or_pass(
        "FAIL",
        "undecodable",
        [image.image_id for image in broken],
        what,
        f"all {len(images):,} images on disk can be decoded",
    )
    tiny = [image.image_id for image in images if image.error is None and image.side < TINY_SIDE]
    yield found_or_pass(
        "WARN",
        "tiny",
        tiny,
        f"images with a side below {TINY_SIDE} pixels",
        f"no image has a side below {TINY_SIDE} pixels",
    )
    yield from identical_images((image.image_id, image.label, image.sha256) for image in images)
