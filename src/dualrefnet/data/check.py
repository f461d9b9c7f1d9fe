"""Say what is wrong with a data set before anybody trains on it: one finding a question, each with a verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.images import decode_image, is_image, list_files
from dualrefnet.data.protocols import leakage
from dualrefnet.data.schema import BOOLEAN_VALUES, Dataset, MetadataField, unnamed_patients
from dualrefnet.data.store import map_ahead
from dualrefnet.errors import ImageError
from dualrefnet.runtime.images import MAX_BYTES

if TYPE_CHECKING:
    import pandas as pd

Level = Literal["PASS", "WARN", "FAIL"]

MAX_EXAMPLES = 10
TINY_SIDE = 64
# Pacheco et al. 2020, table 2; the ground truth of the ISIC 2019 challenge.
OFFICIAL_CLASS_COUNTS = {
    "pad_ufes_20": {"ACK": 730, "BCC": 845, "MEL": 52, "NEV": 244, "SCC": 192, "SEK": 235},
    "isic_2019": {"MEL": 4522, "NV": 12875, "BCC": 3323, "AK": 867, "BKL": 2624, "DF": 239, "VASC": 253, "SCC": 628},
}


@dataclass(frozen=True)
class Finding:
    level: Level  # PASS; WARN: known and worth knowing; FAIL: fix it before training
    check: str  # short id, the same in every release
    message: str  # one sentence for people
    examples: tuple[str, ...] = ()  # up to ten ids
    count: int = 0  # of rows, images or values

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "examples": list(self.examples)}


def finding_or_pass(level: Level, check: str, ids: Sequence[str], problem: str, otherwise: str = "") -> Finding:
    """Return a finding of `level` that says the `problem` of the `ids`, or a PASS (`otherwise`) if there are none."""
    if not ids:
        return Finding("PASS", check, otherwise)
    return Finding(level, check, f"{problem}: {len(ids):,}", tuple(ids[:MAX_EXAMPLES]), len(ids))


def identical_images(images: Iterable[tuple[str, str, str]]) -> Iterator[Finding]:
    """Report byte-identical images, given id, label and hash of the bytes (empty: unknown) of every image."""
    import pandas as pd

    table = pd.DataFrame(images, columns=["image_id", "label", "sha256"])
    # A group of pandas takes longer than decoding a small image, and nearly every image is alone.
    copies = table[(table["sha256"] != "") & table["sha256"].duplicated(keep=False)]
    other_label, same_label = [], []
    for _, group in copies.groupby("sha256", sort=False):
        if group["label"].nunique() > 1:
            other_label.append(" = ".join(group["image_id"] + " (" + group["label"] + ")"))
        else:
            same_label.append(" = ".join(group["image_id"]))
    problem = "byte-identical images under different labels (at least one label is wrong), groups"
    otherwise = "no images of different labels are identical"
    yield finding_or_pass("WARN", "identical_other_label", other_label, problem, otherwise)
    problem = "byte-identical images under one label (only tables of your own keep them in one split), groups"
    yield finding_or_pass("WARN", "identical_same_label", same_label, problem, "no images of one label are identical")


@dataclass(frozen=True)
class CheckReport:
    dataset: str
    root: Path
    findings: list[Finding]  # in the order of the checks

    @property
    def failed(self) -> bool:
        return any(finding.level == "FAIL" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        findings = [finding.to_json() for finding in self.findings]
        return {"dataset": self.dataset, "root": str(self.root), "failed": self.failed, "findings": findings}


def check_dataset(
    name: str, root: Path | None, description: Path | None = None, workers: int | None = None
) -> CheckReport:
    """Check the table, the metadata and every image of a data set."""
    dataset = load_dataset(name, root, description)
    table = dataset.with_image
    rows = list(zip(table["image_id"], table["label"], table["image_path"], strict=True))
    findings = check_table(dataset)
    # Of each decoded image only its hash and size are kept, so memory doesn't grow with the images.
    images = list(map_ahead(_read_image, rows, workers, label="reading images"))
    return CheckReport(name, dataset.root, [*findings, *_images(images)])


def check_table(dataset: Dataset) -> list[Finding]:
    """Check the table, the metadata and which images are there; none is read."""
    return [*_rows(dataset), *_patients(dataset), *_metadata(dataset), *_missing_images(dataset)]


def crossing_ids(dataset: Dataset, split: pd.DataFrame) -> Iterator[Finding]:
    """Report the test images whose patient, and those whose lesion, is also in train or validation."""
    rows = split[["image_id", "split"]].merge(dataset.table, on="image_id", how="left", validate="one_to_one")
    test = rows["split"] == "test"
    for what, leak in leakage(dataset, split).items():
        check, ids = f"{what}s_on_two_sides", rows[f"{what}_id"]
        if leak is None:
            level: Level = "WARN"
            message = f"the data set names no {what}: whether a {what} crosses the split is unknown"
            if what == "lesion" and dataset.schema.unit == "patient":
                level, message = "PASS", "the data set names no lesion; each is of one patient"
            yield Finding(level, check, message)
            continue
        seen = rows.loc[test & ids.isin(ids[~test].dropna()), "image_id"]
        unnamed = int((test & ids.isna()).sum())
        but = f" ({unnamed:,} test images name no {what})" if unnamed else ""
        if seen.empty:
            yield Finding("PASS", check, f"no test image shows a {what} of train or validation{but}")
            continue
        worst = max(leak["per_class"], key=leak["per_class"].get)
        message = (
            f"{leak['train']:.1%} of the test images show a {what} that is also in train ({leak['train_or_val']:.1%} "
            f"counting validation; of class {worst} {leak['per_class'][worst]:.1%}){but}; every result on them is too "
            "good: use the protocol grouped"
        )
        yield Finding("FAIL", check, message, tuple(seen[:MAX_EXAMPLES]), len(seen))


def _rows(dataset: Dataset) -> Iterator[Finding]:
    schema, rows = dataset.schema, len(dataset.table)
    official = schema.official_rows
    if official in (None, rows):
        yield Finding("PASS", "rows", f"{rows:,} rows{'' if official is None else ', as published'}", count=rows)
    else:
        message = f"{rows:,} rows where {official:,} were published; get the metadata again"
        yield Finding("FAIL", "rows", message, count=rows)
    counts = dataset.table["label"].value_counts().reindex(schema.classes, fill_value=0)
    listed = "rows a class: " + ", ".join(f"{label} {count:,}" for label, count in counts.items())
    published = OFFICIAL_CLASS_COUNTS.get(schema.name)
    if published and published != counts.to_dict():
        wrong = [f"{label} ({count:,} published)" for label, count in published.items() if counts[label] != count]
        yield finding_or_pass("FAIL", "classes", wrong, f"{listed}; classes that differ from the publication")
    else:
        problem = "classes without a row (take them out of the classes)"
        yield finding_or_pass("FAIL", "classes", list(counts.index[counts == 0]), problem, listed)


def _patients(dataset: Dataset) -> Iterator[Finding]:
    table = dataset.table
    unnamed = table.loc[table["patient_id"].isna(), "image_id"].tolist()
    if len(unnamed) == len(table):
        yield Finding("WARN", "patients", unnamed_patients(dataset.schema.unit), count=len(unnamed))
        return
    otherwise = f"{table['patient_id'].nunique():,} patients, named in every row"
    problem = "rows without a patient (only a lesion keeps them with others)"
    yield finding_or_pass("WARN", "patients", unnamed, problem, otherwise)
    if table["lesion_id"].notna().any():
        problem = "lesion ids used by several patients (a lesion id alone is no key)"
        otherwise = "no lesion id is shared by patients"
        yield finding_or_pass("WARN", "shared_lesions", dataset.shared_lesions, problem, otherwise)


def _metadata(dataset: Dataset) -> Iterator[Finding]:
    fields = dataset.schema.fields
    unusual = [finding for field in fields for finding in _unusual_values(dataset.table, field)]
    yield from unusual
    if not any(finding.check == "unknown_codes" for finding in unusual):
        yield Finding("PASS", "unknown_codes", "every value is one that its field knows")
    for check, sentence in dataset.notes:
        if check in ("numbers", "labels"):  # The others are found above.
            yield Finding("WARN", check, sentence)
    missing, total = [], 0
    for field in fields:
        values = dataset.table[field.name]
        counts = {"": values.isna().sum(), **{f" {code}": (values == code).sum() for code in field.missing_codes}}
        total += sum(counts.values())
        if any(counts.values()):
            missing.append(f"{field.name} {' + '.join(f'{count:,}{code}' for code, count in counts.items() if count)}")
    if fields:
        message = f"missing cells: {', '.join(missing)}" if missing else "no metadata cell is missing"
        yield Finding("PASS", "missing_metadata", message, count=int(total))


def _unusual_values(table: pd.DataFrame, field: MetadataField) -> Iterator[Finding]:
    values, ids = table[field.name], table["image_id"]
    if field.kind == "numeric":
        return
    alias = values.isin(field.aliases)
    if alias.any():
        used = ", ".join(f"{value} means {field.aliases[value]}" for value in values[alias].value_counts().index)
        yield finding_or_pass("WARN", "aliases", ids[alias].tolist(), f"{field.name}: {used}; rows")
    legal = BOOLEAN_VALUES if field.kind == "boolean" else field.categories
    unknown = values.notna() & ~values.isin([*legal, *field.missing_codes]) & ~alias
    # Without categories of its own a field learns them from the training rows, and nothing is unknown.
    if not legal or not unknown.any():
        return
    # A number in the wrong column may be a date of birth or a record number: it isn't printed.
    words = [word[:30] for word in values[unknown].value_counts().index if not any(map(str.isdigit, word))]
    named = f" ({', '.join(words[:MAX_EXAMPLES])})" if field.kind == "categorical" and words else ""
    known = "True, False" if field.kind == "boolean" else "a category"
    problem = f"{field.name}: values that aren't {known} or a missing code{named}"
    yield finding_or_pass("WARN", "unknown_codes", ids[unknown].tolist(), problem)


def _missing_images(dataset: Dataset) -> Iterator[Finding]:
    missing = dataset.table.loc[dataset.table["image_path"].isna(), "image_id"].tolist()
    if len(missing) == len(dataset.table):
        yield finding_or_pass("FAIL", "rows_without_image", missing, dataset.no_image)
    else:
        problem = "rows without an image (methods that read images leave them out)"
        yield finding_or_pass("WARN", "rows_without_image", missing, problem, "every row has its image")
    used = set(dataset.with_image["image_path"])
    files = {
        file: Path(file).relative_to(folder).as_posix()
        for folder in dataset.image_folders
        for file in list_files(folder)
        if is_image(file)
    }
    spare = [name for path, name in files.items() if path not in used]
    problem = "image files that belong to no row (never read)"
    yield finding_or_pass("WARN", "images_without_row", spare, problem, "every image file belongs to a row")


class _ImageFile(NamedTuple):
    image_id: str
    label: str
    sha256: str  # of its bytes
    side: int  # the shorter one, pixels
    error: str | None  # why it can't be decoded


def _read_image(row: tuple[str, str, str]) -> _ImageFile:
    image_id, label, path = row
    sha256 = ""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        sha256 = hashlib.sha256(data).hexdigest()
        return _ImageFile(image_id, label, sha256, min(decode_image(data).shape[:2]), None)
    except (OSError, ImageError) as error:
        return _ImageFile(image_id, label, sha256, 0, getattr(error, "strerror", None) or str(error))


def _images(images: list[_ImageFile]) -> Iterator[Finding]:
    broken = [image for image in images if image.error is not None]
    problem = f"images that can't be decoded, such as: {broken[0].error}" if broken else ""
    otherwise = f"all {len(images):,} images on disk can be decoded"
    yield finding_or_pass("FAIL", "undecodable", [image.image_id for image in broken], problem, otherwise)
    tiny = [image.image_id for image in images if image.error is None and image.side < TINY_SIDE]
    below = f"a side below {TINY_SIDE} pixels"
    yield finding_or_pass("WARN", "tiny", tiny, f"images with {below}", f"no image has {below}")
    yield from identical_images((image.image_id, image.label, image.sha256) for image in images)
