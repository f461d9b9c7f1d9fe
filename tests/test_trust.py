"""Report sections on calibration, conformal sets and subgroups: their figures and tables."""

import numpy as np
import pandas as pd
import pytest

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.subgroups import (
    Subgroups,
    draw_subgroup_gaps,
    draw_subgroups,
    measure_subgroups,
    subgroups_of_run,
)
from dualrefnet.data.isic_2019 import SCHEMA as ISIC
from dualrefnet.data.pad_ufes_20 import SCHEMA as PAD
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.display.format import PrintedTable
from dualrefnet.report.performance import read_measured
from dualrefnet.report.trust import calibration_section, conformal_section, subgroups_section
from dualrefnet.run import Run
from readable import assert_readable

NAMES = ["MEL", "NV", "background_father = BRAZIL", "AK", "seborrhoeic keratosis", "DF", "melanoma, invasive", "VASC"]


def subgroups_of(count: int, images: int = 400, levels: tuple[str | None, ...] = ("FEMALE", "MALE")) -> Subgroups:
    """Women are mostly right, men mostly wrong; four levels of a second field with a long name, one of them small."""
    generator = np.random.default_rng(count)
    labels, patients = generator.integers(count, size=images), np.arange(images) // 2
    sex = np.array(levels, dtype=object)[patients % len(levels)]
    scores = generator.dirichlet(np.ones(count), images) + 0.1
    right = (sex == "FEMALE") & (generator.random(images) < 0.9)
    scores[np.arange(images), np.where(right, labels, generator.integers(count, size=images))] += 2
    scores /= scores.sum(axis=1, keepdims=True)
    classes, ids = NAMES[:count], [f"i{number}" for number in range(images)]
    places = np.array(["background_father = BRAZIL", "anterior torso", "head/neck"], dtype=object)[patients % 3]
    places[:6] = "palms/soles"
    long = "Where on the body the lesion is, as well as it can be said"
    fields = (
        MetadataField(name="sex", kind="categorical", categories=("FEMALE", "MALE"), subgroup=True),
        MetadataField(name="place", kind="categorical", description=long, subgroup=True),
    )
    schema = DatasetSchema(
        name="csv_table", title="own", classes=tuple(classes), malignant=tuple(classes[:1]), fields=fields
    )
    predictions = pd.DataFrame(scores, columns=[f"prob_{name}" for name in classes])
    predictions = predictions.assign(image_id=ids, label=np.array(classes)[labels])
    rows = pd.DataFrame({"image_id": ids, "sex": sex, "place": places})
    return measure_subgroups(predictions, rows, pd.Series(patients, index=ids), schema, samples=50)


@pytest.mark.parametrize("count", [2, 8])
def test_the_figures_of_subgroups_hold_their_numbers(count: int) -> None:
    found = subgroups_of(count)
    picture = draw_subgroup_gaps(found, "balanced_accuracy")
    for drawn in (picture, draw_subgroups(found, "accuracy"), draw_subgroup_gaps(found, "overconfidence")):
        assert_readable(drawn)
    table = found.table[found.table["measure"] == "balanced_accuracy"].set_index("level")
    sex = picture.figure.axes[0]
    marks = [line for line in sex.lines if line.get_marker() in ("o", "D")]
    assert [line.get_xdata()[0] for line in marks] == pytest.approx(table.loc[["FEMALE", "MALE"], "gap"].tolist())
    spans = [line.get_xdata() for line in sex.lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"][1:]
    assert np.ravel(spans) == pytest.approx(np.ravel(table.loc[["FEMALE", "MALE"], ["gap_low", "gap_high"]]))


def test_the_section_on_subgroups_counts_the_gaps() -> None:
    found = subgroups_of(3, levels=("FEMALE", "MALE", None))
    section = subgroups_section(found)
    assert any(f"{found.flagged} of {found.looked_at} gaps" in finding.message for finding in section.findings)
    tables = [item for item in section.items if isinstance(item, PrintedTable)]
    assert len(tables[0].rows) == found.levels["measured"].sum()
    assert len(tables[1].rows) == found.flagged
    first = tables[0].rows[0]
    values = found.table[(found.table["level"] == "FEMALE")].set_index("measure")["value"]
    assert [cell.text for cell in first[1:3]] == [f"{values[name]:.3f}" for name in ("balanced_accuracy", "accuracy")]
    for picture in section.figures:
        assert_readable(picture)


def test_the_sections_on_calibration_show_what_the_run_measured(tiny_run: Run) -> None:
    measured = read_measured(tiny_run)
    values = measured.metrics["calibrated"]
    calibration, conformal = calibration_section(measured, 20, 0), conformal_section(measured, 20, 0)
    pictures = [*calibration.figures, *conformal.figures]
    assert [one.name for one in pictures] == ["reliability", "selective", "referral"]
    for picture in pictures:
        assert_readable(picture)
    tables = [item for item in (*calibration.items, *conformal.items) if isinstance(item, PrintedTable)]
    assert tables[0].rows[2][1].text == f"{values['before']['brier']:.3f}"
    assert tables[1].rows[0][1].text == f"{values['conformal']['marginal']['coverage']:.3f}"


def test_a_run_can_be_divided_into_the_subgroups_of_its_data_set(opened: OpenedRun) -> None:
    found = subgroups_of_run(opened, samples=20)
    images = found.levels.groupby("field", sort=False)["images"].sum().to_dict()
    assert images == dict.fromkeys(["age", "gender", "fitspatrick", "region"], len(opened.rows("test")))
    for picture in subgroups_section(found).figures:
        assert_readable(picture)


def test_the_shipped_data_sets_name_their_subgroups() -> None:
    fields = {schema.name: [field.name for field in schema.fields if field.subgroup] for schema in (PAD, ISIC)}
    assert fields == {
        "pad_ufes_20": ["age", "gender", "fitspatrick", "region"],
        "isic_2019": ["age_approx", "sex", "anatom_site_general"],
    }
