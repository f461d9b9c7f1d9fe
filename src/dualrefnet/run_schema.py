"""Schemas of a run folder's files: what every reader of a run may rely on.

Whoever edits or damages a file is told so when it is read: its content is checked by pydantic or, of a table, by
column, and compared with the files that it must fit. A check that fails is a ValueError; `Run` names file and cure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.protocols import FOLD, SPLIT_COLUMNS
from dualrefnet.data.schema import Unit
from dualrefnet.evaluation.metrics import CLASS_MEASURES, HEADLINE_MEASURES, check_predictions
from dualrefnet.files import read_csv, read_json
from dualrefnet.recipe import ImageSection, ModelSection, Recipe, differences
from dualrefnet.runtime.availability import ALWAYS_RECORDED, IMAGE_ONLY, METADATA_ONLY
from dualrefnet.runtime.metadata import NeuralImputer, Span

if TYPE_CHECKING:
    import pandas as pd

HISTORY = ("epoch", "train_classification", "val_loss", "val_accuracy", "val_balanced_accuracy", "seconds")


class FileSchema(BaseModel):
    """Keys of other versions are let through; no value is converted, since readers take it from the file."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Values(FileSchema):
    """Numbers by name, None where they are undefined, and their intervals."""

    __pydantic_extra__: dict[str, float | tuple[float, float] | None]

    @model_validator(mode="after")
    def _intervals_are_pairs(self) -> Values:
        for name, value in self.__pydantic_extra__.items():
            if "_ci" in name and isinstance(value, float):
                raise ValueError(f"{name} is {value}, not an interval")
        return self


def schema(*measures: str, base: type[FileSchema] = FileSchema, optional: Any = None, **keys: Any) -> Any:
    """Return the schema of an object of measures and typed `keys`; what is `optional` may be absent, not null."""
    fields = {name: (float | None, ...) for name in measures} | {name: (kind, ...) for name, kind in keys.items()}
    absent = {name: (kind, Field(None)) for name, kind in (optional or {}).items()}
    return create_model("Object", __base__=base, **fields, **absent)  # type: ignore[call-overload]


def values(*measures: str, **keys: Any) -> Any:
    return schema(*measures, base=Values, **keys)


def several(item: Any) -> Any:
    return GenericAlias(list, (item,))


def by_name(item: Any) -> Any:
    return GenericAlias(dict, (str, item))


Triple = tuple[float, float, float]
Interval = tuple[float, float]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

Errors = values("ece", "adaptive_ece", "brier", "log_loss")
Sets = values(
    *("coverage", "mean_size", "singletons"),
    filled=int,
    promise=Literal["within", "missed", "exceeded"] | None,
    sizes=list[int],
    per_class=by_name(values("coverage", "mean_size", images=int)),
)
Referral = values(
    *("wanted", "threshold", "sensitivity", "specificity", "referred"),
    **dict.fromkeys(("malignant", "benign", "missed", "spared"), int),
    reached=bool | None,
)
Selected = values(
    *("share", "threshold", "accuracy", "balanced_accuracy"), percent=int, images=int, answered=dict[str, int]
)
Calibrated = schema(
    temperature=float,
    **dict.fromkeys(("before", "after", "difference"), Errors),
    conformal=schema(promised=float, marginal=Sets, by_class=Sets),
    referral=Referral | None,
    selective=values("aurc", table=several(Selected)),
    remarks=list[str],
)
Inputs = values("fields", images=int)
Group = schema(image=bool, above=float, to=float)
Availability = schema(
    inputs=schema(as_recorded=Inputs, optional=dict.fromkeys((ALWAYS_RECORDED, IMAGE_ONLY, METADATA_ONLY), Inputs)),
    groups=several(
        values(*("fields", "temperature", "referral_threshold"), images=int, name=str, group=Group, remarks=list[str])
    ),
)
Metrics = schema(
    *HEADLINE_MEASURES,
    per_class=by_name(values(*CLASS_MEASURES[:-2], **dict.fromkeys(CLASS_MEASURES[-2:], int))),
    confusion_matrix=list[list[int]],
    remarks=list[str],
    leakage=by_name(schema(train=float, train_or_val=float) | None),
    dataset=str,
    drawn=bool,
    optional={
        **{f"{measure}_ci95": Interval for measure in HEADLINE_MEASURES},
        "malignant": Values,
        "bootstrap": schema(samples=int, level=Share, groups=int, samples_without=dict[str, int]),
        "calibrated": Calibrated,
        "availability": Availability,
        "out_of_scope": Values,
        "folds": schema(count=int),
        "aggregated": schema(
            *HEADLINE_MEASURES, by=Literal["lesion", "patient"], images=int, left_out=int, remarks=list[str]
        ),
        "unit": Unit,
    },
)

Thresholds = schema(threshold=Share, class_thresholds=by_name(Share))
ReferralThreshold = schema(threshold=float, optional={"threshold_ci95": Interval}) | None
Calibration = schema(
    classes=list[str],
    malignant=list[str],
    fitted_on=schema(images=int, groups=int, per_class=dict[str, int]),
    temperature=Above0,
    conformal=Thresholds,
    referral_sensitivity=Share,
    referral=ReferralThreshold,
    remarks=list[str],
    optional={
        "temperature_ci95": Interval,
        "field_effects": dict[str, float],
        "availability": several(
            schema(
                group=Group,
                fitted_on=schema(images=int, cancers=int),
                temperature=Above0,
                conformal=Thresholds,
                referral=ReferralThreshold,
                remarks=list[str],
            )
        ),
    },
)

# What an image encoder started from, and the images that it expects.
Source = schema(
    kind=str,
    description=str,
    sha256=str | None,
    mean=Triple,
    std=Triple,
    optional={
        "options": dict[str, Any],
        "trained_on": several(schema(run=str, dataset=str, licence=str, citation=str, model_sha256=str)),
    },
)
Model = schema(
    format=Literal[2],
    dualrefnet=str,
    architecture=schema(image_size=int, metadata_width=int, classes=int, section=ModelSection),
    classes=list[str],
    malignant=list[str],
    dataset=schema(
        name=str,
        title=str,
        licence=str,
        protocol=str,
        drawn=bool,
        optional={"citation": str, "class_names": dict[str, str]},
    ),
    preprocessing=schema(image=ImageSection, mean=Triple, std=Triple),
    metadata=dict[str, Any],
    weights=Annotated[several(Source), Field(min_length=1)],
    # Of one prediction. Of a cross-fitted run: the number of its models.
    optional={"cost": schema(parameters=int, multiply_adds=int), "members": Annotated[int, Field(ge=3, le=50)]},
)

Fingerprint = schema(
    dualrefnet=str,
    git_commit=str | None,
    seed=int,
    packages=dict[str, str],
    data=schema(table_sha256=str, split_sha256=str, rows_used=int),
    hardware=schema(machine=str, cpu=str | None, gpu=str | None, cores=int | None, memory_gib=float),
    precision=str,
    processes=int,
    weights=several(Source),
    # Of model.safetensors, once training is over.
    optional={"model_sha256": str},
)


def read_checked(path: Path, schema: Any) -> dict[str, Any]:
    """Return the content of a JSON file that fits a schema."""
    try:
        schema.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(": ".join(filter(None, (".".join(map(str, found["loc"])), found["msg"])))) from None
    content: dict[str, Any] = read_json(path)
    return content


def read_metrics(path: Path, classes: list[str]) -> dict[str, Any]:
    metrics = read_checked(path, Metrics)
    rows = metrics["confusion_matrix"]
    if list(metrics["per_class"]) != classes or {len(rows), *map(len, rows)} != {len(classes)}:
        raise ValueError("per_class or confusion_matrix isn't of the run's classes")
    return metrics


def read_model(path: Path) -> dict[str, Any]:
    model = read_checked(path, Model)
    classes = model["classes"]
    if len(set(classes)) != len(classes) or not set(model["malignant"]) <= set(classes):
        raise ValueError("a class stands twice in `classes`, or `malignant` names another")
    width = read_encoder(model["metadata"]).width
    expected = {"image_size": model["preprocessing"]["image"]["size"], "metadata_width": width, "classes": len(classes)}
    for name, value in expected.items():
        if model["architecture"][name] != value:
            raise ValueError(f"architecture.{name} isn't {value}, as the rest of the file says")
    return model


def read_encoder(state: Any) -> MetadataEncoder:
    """Return the metadata encoder of a model.json, of which all parts fit each other."""
    try:
        encoder = MetadataEncoder.from_json(state)
        scales, names = np.array([encoder.mean, encoder.std], dtype=float), list(state["names"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"metadata can't be read ({' '.join(str(error).split())})") from None
    if scales.shape != (2, len(encoder.fields)) or len(encoder.categories) != len(encoder.fields):
        raise ValueError("metadata: there aren't as many levels, centres and spreads as fields")
    if not np.isfinite(scales).all() or (scales[1] <= 0).any() or encoder.names != names:
        raise ValueError("metadata: centre, spread or names don't fit the fields")
    if encoder.imputer is not None:
        _check_imputer(encoder.imputer, encoder.spans, len(encoder.leaked_classes))
    return encoder


def _check_imputer(imputer: NeuralImputer, spans: list[Span], diagnoses: int) -> None:
    stop = spans[-1].stop if spans else 0
    spans = [*spans, Span(stop, stop + diagnoses, False)] if diagnoses else spans
    columns, hidden = stop + diagnoses, imputer.weights[0].shape[-1] if imputer.weights else 0
    shapes = [(columns + len(spans), hidden), (hidden,), (hidden, columns), (columns,)]
    if list(imputer.spans) != spans or [one.shape for one in imputer.weights] != shapes:
        raise ValueError("metadata.imputer doesn't fit the columns of the fields")
    finite = all(np.isfinite(numbers).all() for numbers in (*imputer.weights, *imputer.values))
    if [one.ndim for one in imputer.values] != [1] * len(spans) or not finite:
        raise ValueError("metadata.imputer: values don't fit the fields, or aren't finite")


# Keys that runs of earlier versions lack, and whose defaults are what those versions did.
LATER = {
    "data.split_file",
    "data.allow_leak",
    "data.keep",
    "data.classes",
    "model.init_from",
    "model.init_parts",
    "model.vgg_head",
    "model.views",
    "loss.classification_reduction",
    "loss.teacher",
    "loss.teacher_share",
    "training.accumulate",
    "training.ema",
    "training.freeze_stages",
    "training.layer_decay",
    "training.warm_up",
    "tune",
}


def check_recipe(recipe: Recipe) -> Recipe:
    """A run's recipe is resolved: a key that isn't there was lost, and its default may be another value."""
    lost = [key for key in _unset(recipe) if key not in LATER]
    if lost:
        raise ValueError(f"{len(lost)} keys are missing, the first is {lost[0]}")
    return recipe


def _unset(section: BaseModel, prefix: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in section.model_fields_set:
            yield prefix + name
        elif isinstance(value, BaseModel):
            yield from _unset(value, f"{prefix}{name}.")


def check_fits_recipe(model: dict[str, Any], recipe: Recipe) -> None:
    """The model was trained as the recipe says: the same images, metadata and network."""
    sections = {
        "image": (model["preprocessing"]["image"], recipe.image),
        "metadata": (model["metadata"]["section"], recipe.metadata),
        # A method that reconstructs nothing has no decoder, whatever the recipe says.
        "model": ({**model["architecture"]["section"], "decoder": recipe.model.decoder}, recipe.model),
    }
    for name, (trained, section) in sections.items():
        changed = differences(type(section).model_validate(trained), section)
        if changed:
            raise ValueError(f"the model was trained otherwise, {name}.{changed[0]}")
    if model["dataset"]["name"] != recipe.data.dataset:
        raise ValueError(f"the model was trained on {model['dataset']['name']}, not on {recipe.data.dataset}")


def read_split(path: Path) -> pd.DataFrame:
    table = read_csv(path, dtype=str, keep_default_na=False)
    if list(table.columns) not in ([*SPLIT_COLUMNS], [*SPLIT_COLUMNS, FOLD]):
        raise ValueError(f"its columns must be {', '.join(SPLIT_COLUMNS)}, and {FOLD} if it is cross-fitted")
    if not len(table) or table.isna().any(axis=None) or (table == "").any(axis=None):
        raise ValueError("it has no rows, or an empty cell")
    if not table["image_id"].is_unique:
        raise ValueError("an image stands twice")
    _refuse_others(table["split"], ("train", "val", "test"))
    if FOLD in table:
        _refuse_others(table["split"], ("test",))
        _refuse_others(table[FOLD], list(map(str, range(table[FOLD].nunique()))))
        table[FOLD] = table[FOLD].astype(int)
    return table


def read_predictions(path: Path, split: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    texts = ["image_id", "split", "label", "predicted"]
    columns = [*texts, *(f"prob_{name}" for name in classes)]
    table = read_csv(path, dtype=dict.fromkeys(texts, str), keep_default_na=False)
    if list(table.columns) != columns:
        raise ValueError(f"its columns must be {', '.join(columns)}")
    for name in ("label", "predicted"):
        _refuse_others(table[name], classes)
    expected = split.loc[split["split"] != "train", texts[:3]].to_numpy()
    if sorted(map(tuple, table[texts[:3]].to_numpy())) != sorted(map(tuple, expected)):
        raise ValueError("image_id, split and label aren't those of validation and test in split.csv")
    labels = pd.Index(classes).get_indexer(pd.Index(table["label"]))
    check_predictions(labels, table[columns[4:]].to_numpy(), len(classes))
    return table


def read_history(path: Path) -> pd.DataFrame:
    import pandas as pd

    table = read_csv(path)
    lost = [name for name in HISTORY if name not in table]
    if lost or not len(table):
        raise ValueError(f"it has no column {lost[0]}" if lost else "it has no rows")
    words = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    words += [name for name in HISTORY if table[name].isna().any()]
    if words or not np.array_equal(table["epoch"], np.arange(1, len(table) + 1)):
        raise ValueError(f"column {words[0] if words else 'epoch'} doesn't hold the numbers that it must")
    return table


def _refuse_others(column: pd.Series, known: Sequence[str]) -> None:
    others = column[~column.isin(known)]
    if len(others):
        raise ValueError(f"{column.name} {str(others.iloc[0])!r} is none of {', '.join(known)}")
