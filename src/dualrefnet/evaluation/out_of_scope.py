"""The out-of-scope score of a run: fitted when it is evaluated, and measured against pictures that show no lesion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.errors import DataError
from dualrefnet.evaluation.everyday_pictures import DOCUMENTS, MEDICAL, PHOTOGRAPHS, PLAIN, everyday_pictures, medical_pictures
from dualrefnet.evaluation.healthy_skin import cut_skin
from dualrefnet.evaluation.intervals import draw_counts, group_codes, percentile_interval, wilson_interval
from dualrefnet.evaluation.opened_run import OpenedRun, sample_rows
from dualrefnet.evaluation.resampling import Ranking
from dualrefnet.models.inference import normalise, to_unit
from dualrefnet.models.out_of_scope import FALSE_ALARMS, fit_out_of_scope
from dualrefnet.models.vectors import joined_vectors
from dualrefnet.runtime.preprocessing import preprocess

Progress = Callable[[int, int], None]

# Training photographs that the score is fitted on, at most, drawn with the run's seed: reading more takes longer than it is worth.
AT_MOST = 5000
# Of fewer sources no interval is drawn.
FEW_SOURCES = 5
LESIONS, EVERYDAY = "test photographs of lesions", "all of these three"
SKIN, CLOSE_LESION = "skin beside the lesion", "lesion cut out as large"
BATCH = 32


def fit_run(
    opened: OpenedRun, validation: NDArray[np.float32], test: NDArray[np.float32], progress: Progress | None = None
) -> dict[str, Any]:
    """Fit the score on the training photographs, write `out_of_scope.safetensors`, and return what goes into metrics.json.

    Args:
        opened: the run; its method reads images.
        validation: vectors of the validation side, in its order.
        test: of the test side.
        progress: called with (training photographs read, in all).

    Returns:
        `training` and `validation` (photographs), `intended_false_alarm_rate`, and of the test side `images`, `false_alarms` and
        `false_alarm_rate` with its interval over patients.
    """
    examples = opened.examples("train")
    rows = np.arange(len(examples))
    if len(rows) > AT_MOST:
        rows = np.sort(np.random.default_rng(opened.recipe.seed).choice(len(rows), AT_MOST, replace=False))
    score = fit_out_of_scope(opened.vectors(examples, rows, progress), validation)
    score.save(opened.run.out_of_scope_file)
    flagged = score.score(test) > 1
    wanted = opened.recipe.evaluation.bootstrap
    result: dict[str, Any] = {
        "training": score.training,
        "validation": score.validation,
        "intended_false_alarm_rate": FALSE_ALARMS,
        "images": len(flagged),
        "false_alarms": int(flagged.sum()),
        "false_alarm_rate": float(flagged.mean()),
    }
    groups = opened.groups.loc[opened.rows("test")["image_id"]]
    if wanted and groups.nunique() >= FEW_SOURCES:
        result["false_alarm_rate_ci95"] = list(share_interval(flagged, groups, wanted, opened.recipe.seed))
    return result


@dataclass(frozen=True)
class OutOfScopeMeasured:
    """How well the score tells other pictures from test photographs of lesions.

    Attributes:
        scores: a row a picture: `group`, `source` (patient or file), `score` (more than 1 warns).
        table: a row a group: `group`, `pictures`, `sources`, `auroc` against the test photographs (NaN for these), `flagged` (share
            beyond the limit), and both with `_low` and `_high` (NaN where there are fewer than `FEW_SOURCES` sources).
        skin_auroc: of skin against lesions cut out as large, with its interval; None if there are no masks.
        training: photographs that the score was fitted on.
        validation: photographs that set the limit.
        images: test photographs, of all or a sample.
        samples: resamples.
        seed: of sample, pictures and resamples.
    """

    scores: pd.DataFrame
    table: pd.DataFrame
    skin_auroc: tuple[float, float, float] | None
    training: int
    validation: int
    images: int
    samples: int
    seed: int


def measure_out_of_scope(
    opened: OpenedRun,
    masks: Path | None = None,
    images: int = 500,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> OutOfScopeMeasured:
    """Measure the run's score against the half of the everyday pictures that it was not chosen with, and harder groups.

    Args:
        opened: the run; its method reads images.
        masks: folder of lesion masks; None: `masks` in the data set's folder, and no skin if there is none.
        images: test photographs to look at, each class in proportion.
        samples: bootstrap samples, of patients and of the other pictures' sources.
        seed: of all that is drawn.
        progress: called with (pictures read, in all).

    Raises:
        RunError: the run has no out-of-scope score.
        DataError: `masks` was named and isn't a folder of masks; the method reads no image.
    """
    if not opened.model.reads_image:
        raise DataError("this method reads no photograph, so there is nothing to score")
    score = opened.run.out_of_scope
    examples, rows = opened.pictures("test"), opened.rows("test")
    chosen = sample_rows(examples.labels, images, seed)
    outlined = opened.masks(masks)
    files = dict(zip(rows["image_id"].iloc[chosen], rows["image_path"].iloc[chosen], strict=True))
    with_mask = [image_id for image_id in files if image_id in outlined]
    others = [*everyday_pictures("reporting", seed), *medical_pictures(seed)]
    total = len(chosen) + len(others) + len(with_mask)

    def show(before: int) -> Progress:
        return lambda done, _: progress(before + done, total) if progress is not None else None

    groups = opened.groups
    parts = [_rows(LESIONS, groups.loc[list(files)], score.score(opened.vectors(examples, chosen, show(0))))]
    values = score.score(np.concatenate([*_encode(opened, [item.pixels for item in others], show(len(chosen)))]))
    everyday = _rows([item.group for item in others], [item.source for item in others], values)
    parts.append(everyday)
    for number, image_id in enumerate(with_mask, 1):
        cuttings = cut_skin(Path(files[image_id]), outlined[image_id])
        if cuttings is not None:
            pair = score.score(np.concatenate([*_encode(opened, [cuttings.skin, cuttings.lesion], None)]))
            parts.append(_rows([SKIN, CLOSE_LESION], [groups[image_id]] * 2, pair))
        show(len(chosen) + len(others))(number, total)
    scores = pd.concat(parts, ignore_index=True)
    skin, close = (scores[scores["group"] == name] for name in (SKIN, CLOSE_LESION))
    return OutOfScopeMeasured(
        scores, summarise(scores, samples, seed), _auroc(close, skin, samples, seed) if len(skin) else None,
        score.training, score.validation, len(chosen), samples, seed,
    )  # fmt: skip


def summarise(scores: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    """Return the `table` of `OutOfScopeMeasured` for its `scores`."""
    lesions, rows = scores[scores["group"] == LESIONS], []
    members = {name: (name,) for name in (LESIONS, PHOTOGRAPHS, DOCUMENTS, PLAIN)} | {EVERYDAY: (PHOTOGRAPHS, DOCUMENTS, PLAIN)}
    members |= {name: (name,) for name in (MEDICAL, SKIN, CLOSE_LESION)}
    for name, kinds in members.items():
        part = scores[scores["group"].isin(kinds)]
        if part.empty:
            continue
        flagged = (part["score"] > 1).to_numpy()
        auroc = (np.nan,) * 3 if name == LESIONS else _auroc(lesions, part, samples, seed)
        low, high = share_interval(flagged, part["source"], samples, seed)
        rows.append([name, len(part), part["source"].nunique(), *auroc, flagged.mean(), low, high])
    columns = ["group", "pictures", "sources", "auroc", "auroc_low", "auroc_high", "flagged", "flagged_low", "flagged_high"]
    return pd.DataFrame(rows, columns=columns)


def share_interval(yes: NDArray[np.bool_], groups: ArrayLike, samples: int, seed: int) -> tuple[float, float]:
    """Return the 95% interval of a share over resampled groups.

    Where all or none are yes, every resample says the same; Wilson's interval for as many independent cases as there are groups
    then stands in. NaN for fewer than `FEW_SOURCES` groups.
    """
    codes, names = pd.factorize(np.asarray(groups))
    if len(names) < FEW_SOURCES:
        return np.nan, np.nan
    if yes.all() or not yes.any():
        return wilson_interval(len(names) if yes.all() else 0, len(names))
    hits, sizes = np.bincount(codes, yes), np.bincount(codes).astype(float)
    drawn = np.concatenate([(times @ hits) / (times @ sizes) for times in draw_counts(len(names), samples, seed)])
    interval = percentile_interval(drawn, 0.95)
    assert interval is not None
    return interval


def _auroc(lesions: pd.DataFrame, others: pd.DataFrame, samples: int, seed: int) -> tuple[float, float, float]:
    """Return how often another picture scores higher than a lesion, and the interval over patients and sources.

    Patients are drawn from patients and sources from sources; what was cut from patients' photographs is drawn with them.
    """
    both = pd.concat([lesions, others])
    codes = group_codes(both["source"])
    patients = int(codes[: len(lesions)].max()) + 1
    apart = int(codes.max()) + 1 - patients
    ranking = Ranking.of(both["score"].to_numpy(), np.arange(len(both)) >= len(lesions), codes)
    value = float(ranking.auc(np.ones((patients + apart, 1)))[0])
    if min(patients, apart or patients) < FEW_SOURCES:
        return value, np.nan, np.nan
    streams = [draw_counts(patients, samples, seed)] + ([draw_counts(apart, samples, seed + 1)] if apart else [])
    drawn = np.concatenate([ranking.auc(np.hstack(times).T) for times in zip(*streams, strict=True)])
    low, high = percentile_interval(drawn, 0.95) or (np.nan, np.nan)
    return value, low, high


@torch.inference_mode()
def _encode(opened: OpenedRun, pictures: Sequence[NDArray[np.uint8]], progress: Progress | None) -> Iterator[NDArray[np.float32]]:
    """Preprocess pictures as uploads are and give their vectors, a batch at a time."""
    section = opened.recipe.image
    for start in range(0, len(pictures), BATCH):
        ready = np.stack([preprocess(picture, section) for picture in pictures[start : start + BATCH]])
        images = torch.from_numpy(ready).permute(0, 3, 1, 2).to(opened.device)
        yield joined_vectors(opened.model.encode(normalise(to_unit(images, section.size), opened.normalisation)))
        if progress is not None:
            progress(min(start + BATCH, len(pictures)), len(pictures))


def _rows(group: str | list[str], source: Sequence[str] | pd.Series, score: NDArray[np.float64]) -> pd.DataFrame:
    return pd.DataFrame({"group": group, "source": list(source), "score": score})
