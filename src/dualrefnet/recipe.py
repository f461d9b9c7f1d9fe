"""A recipe: one YAML file that says everything a run needs, checked before anything is computed.

A key that a recipe doesn't name has the default below; a key that doesn't exist is an error with a suggestion.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dualrefnet.errors import RecipeError
from dualrefnet.files import is_file, parse_yaml, read_yaml_text


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values can't be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


AnySection = typing.TypeVar("AnySection", bound=Section)
CROSS_FITTED = "cross-fitted"
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Units of a layer; what is larger fits no memory.
Width = Annotated[int, Field(ge=1, le=65_536)]
Probability = Annotated[float, Field(ge=0, le=1)]


def _class_name(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a class called yes, no, true or false needs quotes: YAML reads a truth value")
    return str(value) if isinstance(value, int) else value


# YAML reads the classes 0 and 1 as numbers.
ClassName = Annotated[str, BeforeValidator(_class_name)]


class DataSection(Section):
    """Which images, and how they become train, validation and test rows."""

    dataset: str = Field("pad_ufes_20", description="adapter: pad_ufes_20, isic_2019, sample or csv_table")
    root: str | None = Field(None, description="the data's folder; empty: the one of that name in $DUALREFNET_DATA")
    description: str | None = Field(None, description="csv_table only: the YAML file that describes the columns")
    rows: Literal["with_image", "all"] = Field(
        "with_image", description="all: rows without an image too (metadata_only alone can use them)"
    )
    protocol: Literal["paper", "grouped", "grouped-cv", "cross-fitted", "all", "own"] = Field(
        "grouped",
        description="how rows are divided; only `paper` may leak. cross-fitted: one model a fold, each tested on the "
        "fold that it hasn't seen; together they are an ensemble. all: no test set, for a last model after a measured "
        "one. own: as split_file or the table says",
    )
    split_file: str | None = Field(
        None, description="own: CSV of image_id and split (train, val, test); empty: the csv_table's column `split`"
    )
    allow_leak: bool = Field(False, description="own: a patient may be in two splits, and every output says so")
    fold: int = Field(0, ge=0, description="which fold of grouped-cv is the test set")
    folds: int = Field(5, ge=3, le=50, description="number of folds; one is the test set (not of `paper`)")
    split_seed: Seed = Field(0, description="shuffles the grouped split; apart from `seed`: several seeds, one split")
    keep: tuple[ClassName, ...] = Field((), description="these classes alone; rows of others are left out; empty: all")
    classes: dict[ClassName, tuple[ClassName, ...]] = Field(
        {}, description="groups of the data set's classes, such as {malignant: [MEL, BCC], benign: [NEV]}; empty: none"
    )

    @property
    def may_leak(self) -> bool:
        """True if a patient may be in two splits."""
        return self.protocol == "paper" or self.allow_leak


class MetadataSection(Section):
    """How the patient's metadata becomes a vector."""

    tier: Literal["M0", "M1", "M2", "M3"] = Field(
        "M2", description="M0 none, M1 always recorded, M2 all fields, M3 those and missingness flags (research only)"
    )
    imputation: Literal["neural", "zero", "token", "label_leaking"] = Field(
        "neural",
        description="missing fields: predicted without labels; zero (which shows that they are missing); a learned "
        "token (which shows it too, and lets images be missing: see modality_dropout); label_leaking: predicted from "
        "the diagnosis, only to demonstrate that leak: such a model can't be used",
    )
    unknown: Literal["level", "missing"] = Field("level", description="codes such as UNK: a category, or missing")
    scale: Literal["zscore", "raw"] = Field(
        "zscore", description="numbers: standardised as in training, or as they are"
    )
    merge_aliases: bool = Field(True, description="BRASIL is BRAZIL")


class ImageSection(Section):
    """How an image becomes the square in the image store."""

    size: int = Field(224, ge=32, le=1024, multiple_of=32, description="side of the model's input, pixels")
    colour_constancy: Literal["shades_of_gray", "none"] = Field(
        "shades_of_gray", description="remove the light's colour"
    )
    minkowski_p: float = Field(6.0, ge=1, description="norm of Shades of Gray; 1 is Grey World")
    gamma: float | None = Field(None, gt=0, description="decode this gamma before colour constancy (2.2), or empty")
    clahe: bool = Field(True, description="contrast-limited adaptive histogram equalisation of L in LAB")
    clahe_clip: float = Field(1.0, gt=0, description="clip limit of CLAHE")
    clahe_grid: int = Field(12, ge=1, le=64, description="CLAHE works on grid x grid tiles")
    clahe_channel_order: Literal["correct", "hm_compat"] = Field(
        "correct", description="hm_compat: red and blue swapped in L, as in released code of the lineage"
    )
    fit: Literal["squash", "crop"] = Field("squash", description="to a square: squash, or crop the longer side")


class AugmentationSection(Section):
    """What happens to a training image before the model sees it; probabilities are per image."""

    enabled: bool = True
    horizontal_flip: Probability = Field(0.5, description="probability")
    vertical_flip: Probability = Field(0.5, description="probability")
    scale: tuple[float, float] = Field((0.7, 1.0), description="side of the random crop, as a share of the image's")
    rotation: float = Field(0.0, ge=0, le=180, description="rotate by up to this many degrees")
    brightness: Probability = Field(0.15, description="multiply by 1 +- this")
    contrast: Probability = Field(0.15, description="stretch about the mean by 1 +- this")
    saturation: Probability = Field(0.15, description="mix with grey by 1 +- this")
    noise: float = Field(0.02, ge=0, le=0.5, description="std of Gaussian noise is drawn from 0..this (range 0..1)")

    @model_validator(mode="after")
    def _scale_in_order(self) -> AugmentationSection:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < low <= high <= 1, not {list(self.scale)}")
        return self


class ModalityDropoutSection(Section):
    """What is missing in training, so that the model copes with whatever is missing later.

    `fields` and `pattern` are drawn for every case and epoch. `metadata` and `image` are not drawn: every case is
    classified with both, without metadata and without the image, and each answer has its share of the classification
    loss. That is the mean over which modality would have been dropped, at no cost, since the image is encoded once.
    """

    model_config = ConfigDict(populate_by_name=True)

    fields: Probability = Field(0.0, description="probability of hiding a random share of the fields, from none to all")
    pattern: Probability = Field(0.0, description="probability of hiding what is missing in another training case")
    metadata: float = Field(
        0.0, ge=0, lt=1, alias="form", description="share of the classification loss that is of images alone"
    )
    image: float = Field(0.0, ge=0, lt=1, description="share of the classification loss that is of metadata alone")

    @property
    def enabled(self) -> bool:
        """True if anything is missing in training."""
        return bool(self.fields or self.pattern or self.metadata or self.image)

    @model_validator(mode="after")
    def _something_whole(self) -> ModalityDropoutSection:
        if self.metadata + self.image >= 1:
            raise ValueError("modality_dropout.metadata and image must stay below 1: nothing is left to whole cases")
        return self


class ModelSection(Section):
    """The architecture."""

    method: str = Field("dualrefnet", description="the system; `dualrefnet methods` lists them")
    backbone: str = Field(
        "mobilenet_v2", description="image encoder: the paper's name (`dualrefnet doctor` lists them), or timm:NAME"
    )
    members: tuple[str, ...] = Field(
        (),
        description="ensemble: its encoders, published: efficientnet_b4, densenet121, resnet50; empty: 3 `backbone`s",
    )
    weights: str = Field("auto", description="auto: local file, package, then hub; hub; none (from scratch); or a file")
    init_from: str | None = Field(
        None, description="transfer: the folder of another run, whose parameters the model starts from"
    )
    init_parts: Literal["all", "encoder"] = Field(
        "all", description="of init_from: all tensors that fit by name and shape, or those of the image encoder alone"
    )
    metadata_encoder: Literal["mlp", "attention", "transformer"] = Field(
        "mlp", description="dualrefnet, auxnet: four layers; the same on columns weighted by attention; a transformer"
    )
    metadata_widths: tuple[Width, ...] = Field(
        (64, 128, 256, 512), min_length=1, max_length=32, description="layers of the metadata network"
    )
    fusion: Literal["concat", "hadamard", "cross_attention"] = Field(
        "concat", description="dualrefnet, auxnet: concatenation; product; or attention from the metadata to the image"
    )
    combination_factor: float = Field(0.8, gt=0, lt=1, description="concat: share of image features in the vector")
    metanet_variant: Literal["original", "mb_compat"] = Field(
        "original", description="metanet: one gate a channel; mb_compat: the one behind the published table"
    )
    vgg_head: Literal["pool", "flatten"] = Field(
        "pool",
        description="no_metadata, concat, metanet and metablock on vgg13: its last map as its mean, or flattened as "
        "behind the published table",
    )
    views: Literal[1, 2, 4, 8] = Field(
        1,
        description="copies of an image over which its features are averaged in prediction: mirrored (2), upside down "
        "too (4), turned by a quarter too (8); costs as many passes",
    )
    hidden: Width = Field(256, description="width of the layer before the classifier")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="before the classifier and after the fused vector; published rates of others stay"
    )
    decoder: Literal["bottleneck", "plain", "none"] = Field(
        "bottleneck", description="dualrefnet, auxnet: plain is the literal reading; none: no auxiliary task"
    )
    target: Literal["bilinear", "bicubic", "native", "carn_m", "ninasr_b0", "ninasr_b1", "edsr"] = Field(
        "bilinear", description="x2 image to rebuild: interpolated; native: the real one; or a network's output"
    )
    target_weights: str = Field("auto", description="weights of the network that makes the target: auto, or a file")

    @property
    def backbones(self) -> tuple[str, ...]:
        """The image encoders that the method may have, in order: one, or the members of an ensemble."""
        if self.method != "ensemble":
            return (self.backbone,)
        return self.members or (self.backbone,) * 3


class LossSection(Section):
    """Equations 4 to 7 and their readings."""

    classification: float = Field(0.5, ge=0, description="alpha, factor of the weighted cross-entropy")
    classification_reduction: Literal["weights", "batch", "sum"] = Field(
        "weights", description="cross-entropy: divided by the weights of the batch, by its images, or summed (eq. 5)"
    )
    reconstruction: float = Field(1.0, ge=0, description="beta, factor of the super-resolution error")
    penalty: float = Field(1.0, ge=0, description="gamma, factor of the class-frequency-weighted L1 penalty R")
    penalty_strength: float = Field(0.3, ge=0, description="lambda inside R: 0.3 for PAD-UFES-20, 0.2 for ISIC-2019")
    frequency: Literal["raw", "sum1", "mean1", "balanced"] = Field(
        "raw", description="f: 1/n, scaled to sum 1, scaled to mean 1, or N/(C n)"
    )
    direction: Literal["inverse", "constant", "proportional"] = Field(
        "inverse", description="f grows with 1/n, not at all, or with n"
    )
    assignment: Literal["constant", "cyclic", "blocks", "affinity", "batch"] = Field(
        "affinity", description="which f a hidden unit has"
    )
    reduction: Literal["sum", "mean"] = Field("sum", description="R sums over the weights, or averages")
    class_weights: Literal["inverse", "none", "logit_adjustment"] = Field(
        "inverse", description="cross-entropy: N/n_c, equal, or equal with log frequencies added to training logits"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")
    teacher: str | None = Field(
        None, description="a cross-fitted run, whose out-of-fold probabilities are learned too (`dualrefnet distil`)"
    )
    teacher_share: Probability = Field(0.5, description="of the teacher's probabilities in what is learned")


class TrainingSection(Section):
    """How the parameters are found."""

    encoder: Literal["fine_tuned", "frozen"] = Field(
        "fine_tuned", description="frozen: image features are computed once: seconds a run, no augmentation"
    )
    epochs: int = Field(12, ge=1, le=1_000_000)
    batch_size: int = Field(32, ge=2, le=65_536)
    accumulate: int = Field(
        1, ge=1, description="parts of a batch whose gradients are computed one after the other and added: less memory"
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    schedule: Literal["one_cycle", "plateau", "constant"] = Field(
        "one_cycle", description="one_cycle: by step; plateau: by validation loss"
    )
    plateau_patience: int = Field(5, ge=0, description="epochs without a lower validation loss before the rate is cut")
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    minimum_learning_rate: float = Field(1e-6, ge=0)
    warm_up: float = Field(0.25, ge=0, lt=1, description="one_cycle: share of the steps in which the rate rises")
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="each layer of the encoder learns at this share of the next one's rate; empty: off",
    )
    freeze_stages: int = Field(
        0,
        ge=0,
        description="stem and this many first stages (of transformers: blocks) of the encoder don't learn; 0: all do",
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the moving average of the parameters, which is validated and kept"
    )
    early_stopping: int | None = Field(None, ge=1, description="stop after so many epochs without a better selection")
    selection: Literal["balanced_accuracy", "accuracy", "loss", "last"] = Field(
        "balanced_accuracy", description="best epoch by this on validation; last: validation serves calibration alone"
    )
    gradient_clip: float | None = Field(None, gt=0, description="largest norm of the gradient; empty: no limit")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the hardware has it and the encoder gains by it"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    tracker: Literal["none", "tensorboard", "mlflow", "wandb"] = Field(
        "none", description="also log to a tracker, which must be installed (extra `track`: tensorboard)"
    )


class EvaluationSection(Section):
    """How the run is measured."""

    bootstrap: int = Field(1000, ge=0, le=1_000_000, description="bootstrap samples for the intervals; 0: none")
    coverage: float = Field(0.9, gt=0, lt=1, description="how often a conformal set shall hold the right class")
    referral_sensitivity: float = Field(0.95, gt=0, le=1, description="share of the cancers that referral shall find")
    batch_size: int = Field(64, ge=1, le=65_536)


class TuneRange(Section):
    """The values of one key among which `dualrefnet tune` searches: `low` to `high`, or some `values`."""

    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="equal ratios are as likely, not equal differences")
    values: tuple[Any, ...] = Field((), description="instead of low and high: any of these")

    @model_validator(mode="after")
    def _one_kind(self) -> TuneRange:
        if self.values:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give `values`, or `low` and `high`, not both")
            if len({str(value) for value in self.values}) < 2:
                raise ValueError("one value leaves nothing to choose from")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("give `low` < `high`, or a list of `values`")
        elif self.log and self.low <= 0:
            raise ValueError("with `log` low must be above 0")
        return self


# Methods with the super-resolution branch.
WITH_DECODER = ("dualrefnet", "auxnet")


class Recipe(Section):
    """Everything a run needs. See the YAML files that ship in `dualrefnet/recipes/`."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names the run folder", max_length=200)
    description: str = ""
    seed: Seed = 0
    data: DataSection = DataSection()
    metadata: MetadataSection = MetadataSection()
    image: ImageSection = ImageSection()
    augmentation: AugmentationSection = AugmentationSection()
    modality_dropout: ModalityDropoutSection = ModalityDropoutSection()
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    tune: dict[str, TuneRange] = Field({}, description="dotted key -> where `dualrefnet tune` searches; else unused")

    @property
    def rebuilds_image(self) -> bool:
        """True if the auxiliary task is part of the training: a frozen encoder has nothing to learn from it."""
        has_decoder = self.model.method in WITH_DECODER and self.model.decoder != "none"
        return has_decoder and self.training.encoder == "fine_tuned"

    @property
    def chooses_by_validation(self) -> bool:
        """True if training decides something by the validation split, which then can't serve as a test."""
        section = self.training
        epoch = section.selection != "last" or section.early_stopping is not None
        return epoch or section.schedule == "plateau" or self.model.method == "ensemble"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        data, model, method = self.data, self.model, self.model.method
        contradictions = (
            (data.fold >= data.folds, f"data.fold {data.fold} doesn't exist: there are {data.folds}, counted from 0"),
            (
                data.protocol not in ("grouped-cv", "cross-fitted") and data.fold != 0,
                f"data.fold is for the protocol grouped-cv; {data.protocol} has one split",
            ),
            (
                data.protocol == "cross-fitted" and self.metadata.imputation == "label_leaking",
                "metadata.imputation label_leaking demonstrates a leak, and a cross-fitted run is to be used: choose "
                "another",
            ),
            (
                method == "metadata_only" and self.metadata.tier == "M0",
                "model.method metadata_only needs metadata: set metadata.tier to M1, M2 or M3",
            ),
            (
                self.modality_dropout.enabled and self.metadata.imputation != "token",
                "modality_dropout needs metadata.imputation token in place of what it hides; else modality_dropout={}",
            ),
            (
                self.training.selection == "last" and self.training.early_stopping is not None,
                "training.early_stopping waits for a better epoch, and training.selection last takes the last: choose",
            ),
            (
                model.views > 1 and self.training.encoder == "frozen",
                "model.views averages over several passes of the encoder, and of a frozen one the features of one are "
                "stored: set model.views to 1",
            ),
            (
                model.init_from is not None and model.weights != "auto",
                "model.init_from and model.weights both say what the encoder starts from: leave one out",
            ),
            (
                model.init_from is None and model.init_parts != "all",
                "model.init_parts says what is taken from a run: name it with model.init_from",
            ),
            (
                self.training.warm_up != 0.25 and self.training.schedule != "one_cycle",
                "training.warm_up is for training.schedule one_cycle",
            ),
            (
                bool(self.training.layer_decay or self.training.freeze_stages)
                and (self.training.encoder == "frozen" or method == "metadata_only"),
                "training.layer_decay and training.freeze_stages are for an encoder that is fine-tuned",
            ),
            (
                model.init_from is not None and method == "metadata_only",
                "model.init_from takes an image encoder, and model.method metadata_only has none",
            ),
            (bool(model.members) and method != "ensemble", f"model.members is for model.method ensemble, not {method}"),
            (
                data.rows == "all" and method != "metadata_only",
                f"data.rows all is for model.method metadata_only; {method} needs images",
            ),
            (
                data.protocol != "own" and (data.split_file is not None or data.allow_leak),
                "data.split_file and data.allow_leak are for data.protocol own",
            ),
            (
                data.protocol == "paper" and bool(data.keep or data.classes),
                "the paper's split is of all its classes: data.keep and data.classes need another data.protocol",
            ),
            (
                data.description is not None and data.dataset != "csv_table",
                "data.description is for data.dataset csv_table",
            ),
        )
        for wrong, message in contradictions:
            if wrong:
                raise ValueError(message)
        return self


def shipped_recipes() -> list[str]:
    """Return the names of the recipes inside the package, sorted."""
    folder = resources.files("dualrefnet") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(name_or_file: str | Path) -> str:
    """Return the YAML text of a shipped recipe or of a file; a file of that name wins."""
    return shipped_text("recipe", name_or_file, "recipes", shipped_recipes())


def shipped_text(kind: str, name_or_file: str | Path, folder: str, shipped: list[str]) -> str:
    """Return the text of a YAML file, or of one of the `shipped` in the package's `folder`; `kind` is for the error."""
    path = Path(name_or_file)
    if is_file(path):
        return read_yaml_text(path)
    if str(name_or_file) in shipped:
        return resources.files("dualrefnet").joinpath(folder, f"{name_or_file}.yaml").read_text(encoding="utf-8")
    names = f"{', '.join(shipped)}{suggestion(str(name_or_file), shipped)}"
    raise RecipeError(f"there is no {kind} file {name_or_file}, and no {kind} of that name ships; shipped: {names}")


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, the name of a shipped recipe, a mapping, or a recipe.
        overrides: dotted key -> value, such as `{"training.epochs": 3}`.

    Raises:
        RecipeError: the file is missing or isn't YAML; a key is unknown; a value is wrong or contradicts another.
    """
    if isinstance(source, Recipe):
        values: Any = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, Mapping):
        values = dict(source)
    else:
        values = parse_mapping(recipe_text(source), source)
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    return validate(Recipe, values)


def parse_mapping(text: str, source: str | Path) -> dict[str, Any]:
    """Parse the YAML text of a recipe or suite; `source` names it in errors."""
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise RecipeError(f"{source} must hold `key: value` lines")
    return values


def validate(section: type[AnySection], values: Mapping[str, Any]) -> AnySection:
    """Check values against a section; the error names the first five wrong keys, unknown ones with a suggestion."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(item, section) for item in error.errors()[:5])) from None


def differences(old: BaseModel, new: BaseModel) -> list[str]:
    """Name the keys in which two recipes or suites differ, with both values."""
    return [f"{key}: {before} there, {after} now" for key, (before, after) in changes(old, new).items()]


# What only describes a recipe, a suite, or a recipe that is written into one; `data.description` names a file.
_WORDS = re.compile(r"(grid\.\d+\.recipe\.)?(title|description)")


def changes(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two recipes or suites differ, each with its value in both; words that only
    describe them aren't compared.
    """
    before, after = (dotted(each.model_dump(mode="json")) for each in (old, new))
    pairs = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not _WORDS.fullmatch(key)}


def dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their dotted keys."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        return {key: leaf for name, inner in value.items() for key, leaf in dotted(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn `["training.epochs=3"]` into `{"training.epochs": 3}`; values are read as YAML."""
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise RecipeError(f"{argument!r} isn't key=value; for example training.epochs=3")
        overrides[key] = parse_yaml(text, f"the value of {argument!r}")
    return overrides


def suggestion(word: str, legal: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a misspelt word, or nothing if no legal one is near, in whatever case."""
    spelt = {name.casefold(): name for name in legal}
    near = difflib.get_close_matches(word.casefold(), spelt, n=1)
    return f"; did you mean {spelt[near[0]]!r}?" if near else ""


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{key}: {part} has no keys below it")
        # A mapping given by the caller must stay as it was.
        values[part] = inner = dict(inner)
        values = inner
    values[last] = value


def _explain(item: Any, section: type[BaseModel]) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    *path, last = item["loc"]
    for part in path:
        if part in section.model_fields:  # Not the place in a list, or the key of a mapping.
            annotation: Any = section.model_fields[part].annotation
            kinds = (annotation, *typing.get_args(annotation))
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    legal = list(section.model_fields)
    return f"unknown key {key!r}{suggestion(str(last), legal)} (keys there: {', '.join(legal)})"
