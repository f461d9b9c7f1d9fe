"""What a cross-fitted ensemble, its members and one model distilled from it give on patients that none has seen.

One fold of the patients of PAD-UFES-20 is held out; everything is trained on the others, members on four fifths of
these. Beside the distilled model stands the same training without a teacher.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import typer

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.protocols import split_dataset
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.comparison import metrics_with_intervals
from dualrefnet.progress import track
from dualrefnet.recipe import load_recipe, parse_overrides
from dualrefnet.training.train import train_recipe
from record import RESULTS, interleaved, record

MEASURES = ("balanced_accuracy", "auc_macro_ovr", "ece")


def hold_out(folder: Path) -> tuple[Path, pd.DataFrame]:
    """Write a data set without the patients of one of five folds; return its folder and that fold's rows."""
    whole = load_dataset("pad_ufes_20")
    split = split_dataset(whole, "cross-fitted", seed=1)
    held_out = set(split.loc[split["fold"] == 0, "image_id"])
    table = pd.read_csv(whole.root / "metadata.csv", dtype=str, keep_default_na=False)
    folder.mkdir(parents=True, exist_ok=True)
    table[~table["img_id"].str.rpartition(".")[0].isin(held_out)].to_csv(folder / "metadata.csv", index=False)
    if not (folder / "images").exists():
        (folder / "images").symlink_to((whole.root / "images").resolve(), target_is_directory=True)
    rows = whole.with_image
    return folder, rows[rows["image_id"].isin(held_out)].reset_index(drop=True)


def main(
    work: Path,
    overrides: list[str] = typer.Argument(None, help="of the recipe pad_ufes_20: image.size=96 training.epochs=6"),
    folds: int = 5,
    share: float = 0.5,
    rounds: int = 30,
    out: Path = RESULTS,
) -> None:
    """Train in the folder WORK, where a call that was cut short goes on, and measure."""
    root, rows = hold_out(work / "data")
    base = {"data.root": str(root), **parse_overrides(overrides or [])}
    ensemble = work / "ensemble"
    whole = {"data.protocol": "all", "data.folds": 10}
    settings = {
        "ensemble": {"data.protocol": "cross-fitted", "data.folds": folds},
        "distilled": {**whole, "loss.teacher": str(ensemble), "loss.teacher_share": share},
        "no teacher": whole,
    }
    runs = {
        name: train_recipe(load_recipe("pad_ufes_20", base | changed), work / name.replace(" ", "-"), resume=True)
        for name, changed in settings.items()
    }
    runs = {f"member {number}": run for number, run in enumerate(runs["ensemble"].members, 1)} | runs
    models = {name: Predictor.load(run) for name, run in runs.items()}
    table = pd.DataFrame([{"model": name, **measure(model, rows)} for name, model in models.items()])
    mean = table[table["model"].str.startswith("member")].mean(numeric_only=True)
    table.loc[len(table)] = {"model": "mean of the members' measures", **mean}
    image, record_ = models["ensemble"].prepare(rows["image_path"][0]), [{"age": 60}]
    timed = [name for name in models if not name.startswith("member")]
    seconds = interleaved(
        {name: lambda model=models[name]: model.predict_arrays([image], record_) for name in timed}, rounds
    )
    table["ms"] = table["model"].map({name: 1000 * float(np.median(times)) for name, times in seconds.items()})
    note = (
        f"PAD-UFES-20, {len(rows)} images of {rows['patient_id'].nunique()} held-out patients; "
        f"{' '.join(overrides or [])}; {folds} members; teacher's share {share}; 95% intervals over patients; "
        f"ms: median of {rounds}, one image"
    )
    record("distillation", table, note, out)


def measure(model: Predictor, rows: pd.DataFrame) -> dict[str, float]:
    """Predict the held-out images with what was recorded, calibrated."""
    fields, classes = [field.name for field in model.fields], list(model.classes)
    records = [{key: value for key, value in row.items() if pd.notna(value)} for row in rows[fields].to_dict("records")]
    images = [model.prepare(path) for path in rows["image_path"]]
    probabilities = []
    for start in track(range(0, len(rows), 32), "predicting"):
        found = model.predict_arrays(images[start : start + 32], records[start : start + 32])
        probabilities += [[one.probabilities[label] for label in classes] for one in found]
    labels = pd.Index(classes).get_indexer(pd.Index(rows["label"]))
    metrics = metrics_with_intervals(labels, np.array(probabilities), Bootstrap(rows["patient_id"], 1000, 0), classes)
    result = {}
    for key in MEASURES:
        low, high = metrics[f"{key}_ci95"]
        result |= {key: metrics[key], f"{key}_low": low, f"{key}_high": high}
    return result


if __name__ == "__main__":
    typer.run(main)
