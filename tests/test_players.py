"""Players of the form and what was answered, in words."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dualrefnet.analysis.shap import MISSING_FLAGS, FeatureGroup, make_feature_groups, read_field_values
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.recipe import MetadataSection

# A form in small: two numbers, a yes-or-no question, a category with an alias and a code for "asked, not known".
SCHEMA = DatasetSchema(
    name="small",
    title="Small",
    classes=("A", "B"),
    fields=(
        MetadataField(name="age", kind="numeric", unit="years", tier="M1"),
        MetadataField(name="smoke", kind="boolean"),
        MetadataField(
            name="origin",
            kind="categorical",
            categories=("BRAZIL", "ITALY"),
            missing_codes=("UNK",),
            aliases={"BRASIL": "BRAZIL"},
        ),
        MetadataField(name="size", kind="numeric"),
        MetadataField(name="never_asked", kind="categorical"),
    ),
)
ROWS = pd.DataFrame(
    {
        "age": [60.0, 40.0, 51.5, 50.0],
        "smoke": ["True", np.nan, "False", "True"],
        "origin": ["BRASIL", "UNK", np.nan, "SPAIN"],
        "size": [np.nan, 4.0, 2.0, 1.0],
        "never_asked": [np.nan] * 4,
    },
    dtype=object,
).astype({"age": float, "size": float})


def fit(**settings: Any) -> MetadataEncoder:
    return MetadataEncoder.fit(ROWS, SCHEMA, MetadataSection(**settings))


def test_by_field_there_is_a_player_for_each_question_and_one_for_all_flags() -> None:
    encoder = fit(tier="M3", imputation="zero")
    players = make_feature_groups(encoder, "field")
    assert encoder.names[:7] == [
        "age",
        "smoke_False",
        "smoke_True",
        "origin_BRAZIL",
        "origin_ITALY",
        "origin_UNK",
        "size",
    ]
    assert players == (
        FeatureGroup("age", "age", "numeric", (0,)),
        FeatureGroup("smoke", "smoke", "boolean", (1, 2)),
        FeatureGroup("origin", "origin", "categorical", (3, 4, 5)),
        FeatureGroup("size", "size", "numeric", (6,)),
        FeatureGroup(MISSING_FLAGS, MISSING_FLAGS, "missing", (7, 8, 9, 10)),
    )
    assert [player.kind for player in make_feature_groups(fit(tier="M2"), "field")] == [
        "numeric",
        "boolean",
        "categorical",
        "numeric",
    ]


def test_by_column_there_is_a_player_for_each_column_under_its_own_name() -> None:
    encoder = fit(tier="M3")
    players = make_feature_groups(encoder, "column")
    assert [player.name for player in players] == encoder.names
    assert [player.columns for player in players] == [(number,) for number in range(encoder.width)]
    assert players[4] == FeatureGroup("origin_ITALY", "origin", "categorical", (4,))
    assert players[7] == FeatureGroup("missing_smoke", "smoke", "missing", (7,))
    with pytest.raises(ValueError, match="by field or by column, not by 'row'"):
        make_feature_groups(encoder, "row")  # type: ignore[arg-type]


def test_answers_are_told_in_words_and_what_was_imputed_is_told_apart() -> None:
    encoder = fit(tier="M3", imputation="neural")
    answers = read_field_values(make_feature_groups(encoder, "field"), encoder, ROWS)
    assert answers.words == (
        ("60 years", "yes", "BRAZIL", "not recorded, imputed", "2 of 4"),
        ("40 years", "not recorded, imputed", "not known", "4", "2 of 4"),
        ("51.5 years", "no", "not recorded, imputed", "2", "2 of 4"),
        ("50 years", "yes", "unknown to the model, imputed", "1", "2 of 4"),
    )
    mean, spread = ROWS["age"].mean(), ROWS["age"].std(ddof=0)
    np.testing.assert_allclose(answers.colours[:, 0], (ROWS["age"] - mean) / spread, rtol=1e-5)
    np.testing.assert_array_equal(answers.colours[:, 1], [1, np.nan, 0, 1])
    assert np.isnan(answers.colours[:, 2]).all()
    assert np.isnan(answers.colours[0, 3])
    np.testing.assert_array_equal(answers.colours[:, 4], 2)
    assert (
        answers.answered.tolist()
        == [[True, True, True, False, True], [True, False, True, True, True]] + [[True, True, False, True, True]] * 2
    )
    zero = fit(tier="M2", imputation="zero", unknown="missing", merge_aliases=False)
    assert read_field_values(make_feature_groups(zero, "field"), zero, ROWS).words[:2] == (
        ("60 years", "yes", "unknown to the model", "not recorded"),
        ("40 years", "not recorded", "not recorded", "4"),
    )


def test_a_column_of_a_category_says_yes_or_no_only_where_there_is_an_answer() -> None:
    encoder = fit(tier="M3", imputation="neural")
    answers = read_field_values(make_feature_groups(encoder, "column"), encoder, ROWS)
    assert answers.words[0][:7] == ("60 years", "no", "yes", "yes", "no", "no", "not recorded, imputed")
    assert answers.words[1][1:7] == (*["not recorded, imputed"] * 2, "no", "no", "yes", "4")
    assert answers.words[1][7:] == ("yes", "no", "no", "yes")
    np.testing.assert_array_equal(answers.colours[1, 1:6], [np.nan, np.nan, 0, 0, 1])
    np.testing.assert_array_equal(answers.colours[1, 7:], [1, 0, 0, 1])
    assert answers.answered[1].tolist() == [True, False, False] + [True] * 8
