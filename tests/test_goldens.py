"""Numbers that no change of the code may change: splits, checks, metrics, intervals and calibration of fixed inputs.

`python tests/test_goldens.py` writes `goldens.json` anew; do that only when a number is meant to change, and say why.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualrefnet.data.adapters import Dataset, load_dataset
from dualrefnet.data.check import check_dataset
from dualrefnet.data.protocols import split_counts, split_dataset
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.calibration import fit_calibration
from dualrefnet.evaluation.comparison import metrics_with_intervals
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.files import sha256_of_json
from resampling import intervals_of

GOLDENS = Path(__file__).with_name("goldens.json")
CLASSES, MALIGNANT = ("ACK", "BCC", "MEL", "NEV"), ("BCC", "MEL")


def predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """160 images of about 100 patients, right more often than not, in round numbers."""
    rng = np.random.default_rng(7)
    labels = rng.choice(4, size=160, p=[0.4, 0.3, 0.1, 0.2])
    scores = rng.integers(1, 100, (160, 4)) + 60 * np.eye(4, dtype=int)[labels]
    return labels, scores / scores.sum(axis=1, keepdims=True), rng.integers(0, 100, 160)


def words_apart(value: Any) -> Any:
    """Everything but sentences, which may change."""
    if isinstance(value, dict):
        return {key: words_apart(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [words_apart(inner) for inner in value if not (isinstance(inner, str) and " " in inner)]
    return value


def measured(root: Path) -> dict[str, Any]:
    dataset: Dataset = load_dataset("sample", root)
    result: dict[str, Any] = {}
    for protocol, fold in (("grouped", 0), ("grouped-cv", 1), ("grouped-cv", 4)):
        rows = split_dataset(dataset, protocol, fold, 5, 3)
        counts = split_counts(rows, dataset.schema.classes).to_dict("index")
        result[f"{protocol} {fold}"] = {"rows": sha256_of_json(rows.to_csv(index=False)), "counts": counts}
    findings = check_dataset("sample", root).findings
    result["check"] = [[finding.level, finding.check, finding.count] for finding in findings]
    labels, probabilities, patients = predictions()
    result["metrics"] = compute_metrics(labels, probabilities, CLASSES, MALIGNANT)
    with_intervals = metrics_with_intervals(labels, probabilities, Bootstrap(patients, 200, 5), CLASSES, MALIGNANT)
    result["intervals"] = intervals_of(with_intervals)
    bootstrap = Bootstrap(patients, 100, 2)
    result["calibration"] = fit_calibration(labels, probabilities, bootstrap, CLASSES, MALIGNANT).to_json()
    return words_apart(json.loads(json.dumps(result)))  # type: ignore[no-any-return]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, inner in items for name, leaf in leaves(inner, f"{path}/{key}").items()}
    return {path: value}


def sample(folder: Path) -> Path:
    return make_synthetic(folder, images=160, side=64, seed=0)


def test_the_numbers_are_those_of_before(tmp_path: Path) -> None:
    new, old = leaves(measured(sample(tmp_path / "data"))), leaves(json.loads(GOLDENS.read_text()))
    assert new.keys() == old.keys()
    for key, value in old.items():
        # A fitted temperature ends where the search stops, which another version of scipy may move a little.
        tolerance = 1e-6 if key.startswith("/calibration") else 1e-12
        assert new[key] == (pytest.approx(value, rel=tolerance, abs=1e-12) if isinstance(value, float) else value), key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDENS.write_text(json.dumps(measured(sample(Path(folder) / "data")), indent=1) + "\n")
