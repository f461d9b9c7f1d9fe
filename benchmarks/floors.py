"""What a trained model must beat: logistic regression on frozen features and on metadata, patient-disjoint, five folds.

Frozen features are the vectors of an ImageNet encoder that nobody fine-tunes. Every fold is the one of the protocol
grouped-cv; validation rows aren't used, so that the numbers are those of the plainest possible model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dualrefnet.data.loader import Examples, fill_recipe_store, make_examples, read_dataset, recipe_split, split_rows
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.models.encoders import create_encoder
from dualrefnet.models.inference import normalise, to_unit
from dualrefnet.recipe import load_recipe
from record import RESULTS, record


@torch.inference_mode()
def frozen_features(examples: Examples, backbone: str, size: int) -> np.ndarray:
    """Return the encoder's vectors, (N, D)."""
    encoder = create_encoder(backbone, image_size=size).eval()
    vectors = []
    for batch in examples.in_order(32):
        images = normalise(to_unit(batch.images, size), (encoder.mean, encoder.std))
        vectors.append(encoder(images).vector.numpy())
    return np.concatenate(vectors)


def main(
    recipe: str = "pad_ufes_20_m3", backbone: str = "efficientnet_lite0", folds: int = 5, out: Path = RESULTS
) -> None:
    """Measure; two minutes on two cores with the images of PAD-UFES-20."""
    base = load_recipe(recipe, {"data.protocol": "grouped-cv", "data.folds": folds})
    dataset = read_dataset(base)
    store = fill_recipe_store(base, dataset)
    vectors: dict[str, np.ndarray] = {}
    scores: dict[str, list[float]] = {}
    for fold in range(folds):
        for tier in ("M1", "M3"):
            chosen = load_recipe(base, {"data.fold": fold, "metadata.tier": tier})
            split = recipe_split(chosen, dataset, store)
            encoder = MetadataEncoder.fit(split_rows(dataset, split, "train"), dataset.schema, chosen.metadata)
            sides = {side: make_examples(dataset, split, side, encoder, store) for side in ("train", "val", "test")}
            for examples in sides.values():
                if not set(examples.image_ids) <= vectors.keys():
                    vectors.update(
                        zip(examples.image_ids, frozen_features(examples, backbone, chosen.image.size), strict=True)
                    )
            image = {side: np.stack([vectors[name] for name in examples.image_ids]) for side, examples in sides.items()}
            form = {side: examples.metadata for side, examples in sides.items()}
            both = {side: np.concatenate([image[side], form[side]], axis=1) for side in sides}
            for name, features in (("image", image), (f"metadata {tier}", form), (f"image + metadata {tier}", both)):
                if name == "image" and tier == "M3":
                    continue
                model = make_pipeline(
                    StandardScaler(),
                    LogisticRegression(C=0.01 if "image" in name else 1.0, max_iter=2000, class_weight="balanced"),
                )
                predicted = model.fit(features["train"], sides["train"].labels).predict(features["test"])
                scores.setdefault(name, []).append(balanced_accuracy_score(sides["test"].labels, predicted))
    rows = [
        {
            "features": name,
            "mean": np.mean(values),
            "sd": np.std(values, ddof=1),
            **{f"fold_{fold}": value for fold, value in enumerate(values)},
        }
        for name, values in scores.items()
    ]
    record(
        f"floors-{recipe}",
        pd.DataFrame(rows),
        f"frozen {backbone} at {base.image.size} px, logistic regression, test balanced accuracy, grouped-cv, "
        f"{folds} folds",
        out,
    )


if __name__ == "__main__":
    typer.run(main)
