"""Thresholds by what is given, and the gate: a model to which missing means benign is neither exported nor served."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dualrefnet.analysis.evaluate import draw_present
from dualrefnet.cli import app, deployment  # noqa: F401 (the module registers the commands)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.metadata import missingness_warning
from dualrefnet.data.pad_ufes_20 import SCHEMA as PAD
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.deploy.export import export_run
from dualrefnet.deploy.predictor import Predictor, refuse_shortcut
from dualrefnet.errors import RunError
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.calibration import Calibration, fit_calibration, fit_thresholds
from dualrefnet.recipe import MetadataSection, load_recipe
from dualrefnet.run import Run
from dualrefnet.runtime.availability import Availability, Thresholds, availability_groups, missingness_shortcut
from dualrefnet.runtime.calibration import Decision
from dualrefnet.training.preflight import check_start
from dualrefnet.training.train import train_recipe

CLASSES, MALIGNANT = ["A", "B", "MEL"], ["MEL"]
EVERYTHING = Availability(True, 2 / 3, 1)
ALONE = Availability(True, 0, 0)


@given(st.booleans(), st.integers(0, 24), st.integers(1, 24))
def test_every_input_is_in_one_group(image: bool, known: int, fields: int) -> None:
    groups = availability_groups(reads_image=True, needs_image=False, reads_metadata=True)
    held = [bool(group.contains([image], [min(known, fields) / fields])[0]) for group in groups]
    assert sum(held) == (1 if image or known else 0)
    assert len({group.name for group in groups}) == len(groups)


@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from([0, 1, 2, 3]))
def test_what_is_left_was_recorded_and_belongs_to_the_group(
    fields: int, seed: int, recorded_share: float, number: int
) -> None:
    generator = np.random.default_rng(seed)
    group = availability_groups(reads_image=True, needs_image=True, reads_metadata=True)[number]
    recorded = generator.random((40, fields)) < recorded_share
    patterns = [generator.random(fields) < 0.5 for _ in range(3)]
    amounts = np.arange(fields + 1)
    present, able = draw_present(recorded, patterns, group, generator)
    if not group.contains(np.ones(fields + 1), amounts / fields).any():
        assert not able.any()
        return
    assert not (present & ~recorded).any()
    assert group.contains(np.ones(40), present.mean(axis=1))[able].all()
    assert not present[~able].any()
    least = amounts[group.contains(np.ones(fields + 1), amounts / fields)].min()
    assert (able == (recorded.sum(axis=1) >= least)).all()


def validation(seed: int, images: int = 400) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    scores = generator.dirichlet(np.full(3, 0.7), images)
    return (generator.random(images)[:, None] > scores.cumsum(axis=1)[:, :-1]).sum(axis=1), scores


def fitted(labels: np.ndarray, scores: np.ndarray, group: Availability = EVERYTHING, draws: int = 1) -> Thresholds:
    return fit_thresholds(group, labels, scores, CLASSES, MALIGNANT, 0.9, 0.95, draws)


def test_the_thresholds_keep_their_promises_on_new_cases() -> None:
    labels, scores = validation(0, 6000)
    found = fitted(labels[:3000], scores[:3000])
    decided = decision_of((found,)).decide(scores[3000:], np.ones(3000), np.ones(3000))
    new = labels[3000:]
    assert decided.sets[np.arange(3000), new].mean() == pytest.approx(0.9, abs=0.02)
    assert decided.refer is not None
    assert decided.refer[new == 2].mean() == pytest.approx(0.95, abs=0.02)
    assert (found.images, found.cancers) == (3000, int((labels[:3000] == 2).sum()))


def test_too_few_cases_give_the_careful_answer() -> None:
    found = fitted(*validation(2, 8), ALONE)
    assert (found.threshold, found.referral) == (0, 0)
    decided = decision_of((found,)).decide(np.array([[0.98, 0.01, 0.01]]), [True], [0])
    assert decided.sets.all()
    assert decided.refer is not None
    assert decided.refer.all()


def decision_of(availability: tuple, malignant: tuple[str, ...] = ("MEL",)) -> Decision:
    return Decision(tuple(CLASSES), malignant, 1.0, 0.9, 0.3, dict.fromkeys(CLASSES, 0.3), 0.5, availability, {})


def test_each_input_is_decided_by_its_own_group_and_an_unknown_one_carefully() -> None:
    labels, scores = validation(3)
    groups = [fitted(labels, scores, group) for group in (ALONE, EVERYTHING)]
    decision = decision_of(tuple(groups))
    row = np.array([[0.9, 0.09, 0.01]] * 3)
    decided = decision.decide(row, [True, True, True], [0, 1, 0.5])
    assert [one.group for one in decided.thresholds[:2]] == [ALONE, EVERYTHING]
    assert decided.refer is not None
    assert decided.refer.tolist() == [False, False, True]
    assert decided.sets[2].all()
    assert not decided.sets[:2].all()
    assert decision_of((), malignant=()).decide(row, [True] * 3, [1, 1, 1]).refer is None


def test_a_calibration_of_an_earlier_version_is_read_and_careful() -> None:
    labels, scores = validation(4)
    thresholds = [fitted(labels, scores)]
    calibration = fit_calibration(
        labels, scores, Bootstrap(np.arange(400), 0), CLASSES, MALIGNANT, availability=thresholds
    )
    text = json.loads(json.dumps(calibration.to_json(), allow_nan=False))
    assert Calibration.from_json(text) == calibration
    del text["availability"], text["field_effects"]
    decided = Calibration.from_json(text).decide(scores, np.ones(400), np.ones(400))
    assert decided.refer is not None
    assert decided.refer.all()


# Cancers referred, above the threshold of the inputs as recorded, and mean malignancy: with metadata and with blank
# ones.
GATE = [
    ((0.95, 0.84), (0.94, 0.84), (0.47, 0.47), "refers 95%"),
    ((0.95, 0.93), (0.94, 0.00), (0.47, 0.11), "missing means benign"),
    # Less to go by, and no lower on average: its own threshold answers for it.
    ((0.95, 0.93), (0.94, 0.80), (0.47, 0.45), None),
    # Lower on average, and no cancer lost.
    ((0.95, 0.93), (0.94, 0.90), (0.60, 0.45), None),
    ((0.95, 1.00), (0.94, 1.00), (0.40, 0.90), None),
    ((None, None), (None, None), (None, None), None),
]


@pytest.mark.parametrize(("referred", "above", "mean", "words"), GATE)
def test_the_gate_compares_the_same_cases_with_and_without_metadata(
    referred: tuple, above: tuple, mean: tuple, words: str | None
) -> None:
    keys = ("cancers_referred", "cancers_at_recorded_threshold", "mean_malignancy")
    full, without = (dict(zip(keys, (referred[place], above[place], mean[place]), strict=True)) for place in (0, 1))
    shortcut = missingness_shortcut({"availability": {"inputs": {"as_recorded": full, "image_only": without}}})
    assert (shortcut is None) == (words is None)
    refuse_shortcut(shortcut, "run", accepted=True)
    if words:
        with pytest.raises(RunError, match=words):
            refuse_shortcut(shortcut, "run", accepted=False)


def test_no_service_of_a_shortcut_is_made_unless_it_is_accepted() -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from dualrefnet.service.app import create_app
    from dualrefnet.service.settings import ServiceSettings
    from live_service import StandInPredictor

    predictor = StandInPredictor()
    predictor.shortcut = "to this model missing means benign"
    with pytest.raises(RunError, match="accept-missingness-shortcut"):
        create_app(predictor, ServiceSettings(page=False))  # type: ignore[arg-type]
    accepted = create_app(predictor, ServiceSettings(page=False, accept_missingness_shortcut=True))  # type: ignore[arg-type]
    with TestClient(accepted, base_url="http://localhost") as client:
        assert client.get("/v1/model").json()["warning"] == predictor.shortcut


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set in which optional fields are recorded for cancers alone, as if only they were biopsied."""
    root = make_synthetic(tmp_path_factory.mktemp("telling") / "data", images=240, side=64)
    table = pd.read_csv(root / "metadata.csv", dtype=str, keep_default_na=False)
    optional = [field.name for field in PAD.fields if field.tier == "M2"]
    benign = ~table["diagnostic"].isin(["BCC", "SCC", "MEL"])
    table.loc[benign, optional] = ""
    # Cancers' metadata are complete; their values say nothing.
    for name in optional:
        values = table.loc[~benign, name]
        table.loc[~benign, name] = np.random.default_rng(0).choice(values[values != ""], len(values))
    table.to_csv(root / "metadata.csv", index=False)
    return root


def trained(root: Path, out: Path, changes: dict[str, object]) -> Run:
    training = {"training.encoder": "frozen", "training.epochs": 25, "evaluation.bootstrap": 20, "image.size": 64}
    return train_recipe(load_recipe("sample", {"data.root": str(root), **training, **changes}), out)


@pytest.fixture(scope="module")
def shortcut(telling: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that sees which fields are missing."""
    flags = {"metadata.tier": "M3", "metadata.imputation": "neural", "modality_dropout": {}}
    return trained(telling, tmp_path_factory.mktemp("shortcut") / "run", flags)


def test_a_shortcut_is_neither_exported_nor_served(shortcut: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"missing means benign.*--accept-missingness-shortcut"):
        export_run(shortcut, tmp_path / "refused", int8=False)
    assert not (tmp_path / "refused").exists()
    served = CliRunner().invoke(app, ["serve", str(shortcut.path)])
    assert served.exit_code != 0
    assert "missing means benign" in str(served.exception)


@pytest.mark.slow
def test_a_model_trained_with_tokens_is_accepted(
    telling: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = trained(telling, tmp_path / "token", {})
    assert "shows the model which fields are missing" not in capsys.readouterr().err
    assert export_run(token, tmp_path / "bundle", int8=False)["missingness_shortcut"] is None
    inputs = token.metrics["availability"]["inputs"]
    assert set(inputs) == {"as_recorded", "always_recorded", "metadata_only", "image_only"}
    assert inputs["image_only"]["fields"] == 0


def test_training_warns_of_an_encoding_that_shows_the_class(
    telling: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load_dataset("sample", telling)
    for section, warned in (
        ({"tier": "M3"}, True),
        ({"tier": "M2", "imputation": "zero"}, True),
        ({"tier": "M2"}, False),
    ):
        said = missingness_warning(MetadataSection(**section), dataset.table, dataset.schema)
        assert (said is not None) == warned
        assert said is None or "0% of the rows with missing fields are malignant, 100% of" in said

    flags = {"metadata.tier": "M3", "metadata.imputation": "neural", "modality_dropout": {}}
    check_start(load_recipe("sample", {"data.root": str(telling), **flags}), tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert "0% of the rows with missing fields are malignant" in lines[0]


@pytest.mark.slow
def test_an_accepted_shortcut_is_warned_of_wherever_the_model_goes(shortcut: Run, tmp_path: Path) -> None:
    bundle = export_run(shortcut, tmp_path / "accepted", int8=False, accept_missingness_shortcut=True)
    assert "missing means benign" in bundle["missingness_shortcut"]
    assert "#b00020" in (tmp_path / "accepted" / "README.md").read_text(encoding="utf-8")
    assert Predictor.load(tmp_path / "accepted").shortcut == bundle["missingness_shortcut"]
