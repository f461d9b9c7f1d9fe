"""A suite: one YAML file that spans a grid of recipes, and the cells (one training each) that it expands to.

A cell's recipe is, from weak to strong: the block's recipe, the block's `set`, the axes of the grid (method, backbone,
fold, seed), the variant's `set`, and the overrides of the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from dualrefnet.errors import RecipeError
from dualrefnet.recipe import Recipe, Section, differences, load_recipe, parse_mapping, shipped_text, validate

# Keys of a recipe that are axes of the grid -> the list in a block that holds their values.
AXES = {"model.method": "methods", "model.backbone": "backbones", "data.fold": "folds", "seed": "seeds"}

# Fits every file system, with room for the suffixes of temporary files.
LONGEST_NAME = 180


class SplitCount(Section):
    """A protocol whose rows are counted, without any training (Table 1)."""

    dataset: str
    protocol: str
    set: dict[str, Any] = Field({}, description="further keys of a recipe, such as data.root")

    @property
    def recipe(self) -> Recipe:
        return load_recipe({"name": "split", "data": {"dataset": self.dataset, "protocol": self.protocol}}, self.set)


class Lookup(Section):
    """Where the paper prints its numbers for a cell."""

    table: str | None = Field(None, coerce_numbers_to_str=True, description="3a, 3b, 4, text; empty: the suite's table")
    metrics: dict[str, str] = Field({}, description="measure -> the paper's name for it, where it is not the usual one")


class Variant(Section):
    """A departure from the block's recipe."""

    name: str = Field("", max_length=100, pattern=r"^$|[A-Za-z0-9]", description="in tables, and in the names of runs")
    set: dict[str, Any] = Field({}, description="dotted key of a recipe -> value")
    paper: Lookup | None = None


class Block(Section):
    """A recipe, and the grid spanned over it; an axis that is not given holds the recipe's own value."""

    recipe: str | dict[str, Any] = Field(
        ..., description="a shipped name, a file (relative to the suite's), or the recipe itself"
    )
    set: dict[str, Any] = Field({}, description="dotted key of a recipe -> value, for every run of the block")
    methods: tuple[str, ...] | None = Field(None, min_length=1)
    backbones: tuple[str, ...] | None = Field(None, min_length=1)
    folds: tuple[int, ...] | None = Field(None, min_length=1)
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    variants: tuple[Variant, ...] = Field((Variant(),), min_length=1)
    paper: Lookup | None = Field(None, description="for every run of the block; a variant's own goes before it")


class Suite(Section):
    """A grid of recipes and the tables to be made of it. See the YAML files in `dualrefnet/recipes/suites/`."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str
    description: str = ""
    smoke: bool = Field(False, description="synthetic images in place of the data sets: a test that everything works")
    table: str | None = Field(
        None, coerce_numbers_to_str=True, description="the paper's table: 1, 2a, 3a, 3b, 4, text ..."
    )
    reference: str | dict[str, str] | None = Field(
        None, description="the method, variant or encoder with which the others are compared; or that of each data set"
    )
    measures: tuple[str, ...] = Field(
        ("accuracy", "balanced_accuracy", "auc_macro_ovr"), description="columns: keys of metrics.json"
    )
    rows: Literal["method", "variant"] = Field("method", description="what a row of the printed table is")
    per_class: bool = Field(False, description="also a table by class")
    splits: tuple[SplitCount, ...] = ()
    grid: tuple[Block, ...] = ()

    def reference_of(self, dataset: str) -> str | None:
        return self.reference.get(dataset) if isinstance(self.reference, dict) else self.reference


class Key(NamedTuple):
    """A system: all cells that differ in fold and seed only. Members of an ensemble are joined by `+` in `backbone`."""

    dataset: str
    protocol: str
    method: str
    backbone: str
    variant: str

    @property
    def name(self) -> str:
        return " ".join(part for part in self if part)


@dataclass(frozen=True)
class Cell:
    """One point of the grid: one training and test. `run` is its folder, or that of an earlier cell of the same recipe.

    `paper` says where the paper prints its numbers, and `reading` which keys of the recipe those numbers are of.
    """

    name: str
    run: str
    key: Key
    recipe: Recipe
    paper: Lookup | None
    reading: dict[str, Any]

    @property
    def fold(self) -> int:
        return self.recipe.data.fold

    @property
    def seed(self) -> int:
        return self.recipe.seed


def shipped_suites() -> list[str]:
    folder = resources.files("dualrefnet") / "recipes" / "suites"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def suite_text(name_or_file: str | Path) -> str:
    """Return the YAML text of a shipped suite or of a file; a file of that name wins."""
    return shipped_text("suite", name_or_file, "recipes/suites", shipped_suites())


def load_suite(name_or_file: str | Path) -> Suite:
    """Read and check a suite: a file, or the name of one that ships. Recipes that its blocks name are read into it."""
    values = parse_mapping(suite_text(name_or_file), name_or_file)
    try:
        suite = validate(Suite, values)
    except RecipeError as error:
        raise RecipeError(f"suite {name_or_file}: {error}") from None
    if not suite.grid and not suite.splits:
        raise RecipeError(f"suite {name_or_file} has neither `grid` nor `splits`: there is nothing to do")
    return with_recipes(suite, Path(name_or_file).parent)


def with_recipes(suite: Suite, folder: Path = Path()) -> Suite:
    """Return the suite with the recipes themselves in place of their names; a file in `folder` wins."""
    blocks = []
    for block in suite.grid:
        recipe = block.recipe
        source = folder / recipe if isinstance(recipe, str) and (folder / recipe).is_file() else recipe
        loaded = load_recipe(source).model_dump(mode="json", exclude_unset=True)
        blocks.append(block.model_copy(update={"recipe": loaded}))
    return suite.model_copy(update={"grid": tuple(blocks)})


def override(suite: Suite, overrides: Mapping[str, Any]) -> Suite:
    """Return the suite with keys of its recipes changed in every run; an axis of the grid takes a list too."""
    axes = {AXES[key]: value if isinstance(value, list) else [value] for key, value in overrides.items() if key in AXES}
    plain = {key: value for key, value in overrides.items() if key not in AXES}

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in overrides}

    blocks = []
    for block in suite.grid:
        variants = [variant.model_copy(update={"set": kept(variant.set)}) for variant in block.variants]
        blocks.append(
            validate(Block, {**block.model_dump(), **axes, "set": {**kept(block.set), **plain}, "variants": variants})
        )
    splits = [split.model_copy(update={"set": {**split.set, **plain}}) for split in suite.splits]
    changed = suite.model_copy(update={"grid": tuple(blocks), "splits": tuple(splits)})
    if "data.root" in plain:
        datasets = {cell.key.dataset for cell in expand(changed)} | {split.dataset for split in splits}
        if len(datasets) > 1:
            raise RecipeError(
                f"data.root is the folder of one data set, and {suite.name} has {' and '.join(sorted(datasets))}; "
                "set DUALREFNET_DATA to the folder that holds both"
            )
    return changed


def same_training(recipe: Recipe) -> str:
    """Return what is equal for two recipes that train the same."""
    return recipe.model_dump_json(exclude={"name", "description"})


def prepare(suite: Suite, overrides: Mapping[str, Any], sample: Path | None = None) -> tuple[Suite, list[str]]:
    """Return a suite with overrides, as a smoke test if there is a `sample` folder, and what that replaces."""
    remarks: list[str] = []
    if sample is not None:
        suite, remarks = smoke(suite, sample)
        ignored = [key for key in overrides if key.startswith("data.")]
        remarks += [f"{key} is ignored: a smoke test has its own data" for key in ignored]
        overrides = {key: value for key, value in overrides.items() if key not in ignored}
    return override(suite, overrides), remarks


def expand(suite: Suite) -> list[Cell]:
    """Return the cells of a suite, in the order of the file. Cells with equal recipes share a run."""
    cells: dict[str, Cell] = {}
    runs: dict[str, str] = {}
    for block in suite.grid:
        for recipe, variant in _recipes(suite, block):
            data, model = recipe.data, recipe.model
            slug = re.sub(r"[^A-Za-z0-9_.]+", "-", variant.name).strip("-.")
            backbone = model.backbone.replace(":", "-")
            parts = (data.dataset, model.method, backbone, slug, f"fold{data.fold}", f"seed{recipe.seed}")
            name = "-".join(part for part in parts if part)
            if len(name) > LONGEST_NAME:
                raise RecipeError(f"{suite.name}: {name} is too long for a folder; shorten the name of the variant")
            recipe = recipe.model_copy(update={"name": name})
            run = runs.setdefault(same_training(recipe), name)
            backbone = "+".join(model.members) or model.backbone
            key = Key(data.dataset, data.protocol, model.method, backbone, variant.name)
            cell = Cell(name, run, key, recipe, variant.paper or block.paper, variant.set if variant.paper else {})
            other = cells.setdefault(name, cell)
            if other != cell:
                found = "; ".join(differences(other.recipe, recipe)) or "the paper's numbers"
                raise RecipeError(
                    f"{suite.name}: two cells are called {name} and differ in {found}; rename the variants of a block"
                )
    return list(cells.values())


def _recipes(suite: Suite, block: Block) -> Iterator[tuple[Recipe, Variant]]:
    """Yield every recipe of a block with its variant; fold and seed change fastest, so that systems stay together."""
    base = load_recipe(block.recipe)
    axes = {key: getattr(block, name) or (None,) for key, name in AXES.items()}
    for method, backbone, variant, fold, seed in product(
        axes["model.method"], axes["model.backbone"], block.variants, axes["data.fold"], axes["seed"]
    ):
        values = zip(AXES, (method, backbone, fold, seed), strict=True)
        chosen = {key: value for key, value in values if value is not None}
        try:
            yield load_recipe(base, {**block.set, **chosen, **variant.set}), variant
        except RecipeError as error:
            where = ", ".join(str(value) for value in (variant.name, *chosen.values()) if value != "")
            raise RecipeError(f"suite {suite.name}{f' ({where})' if where else ''}: {error}") from None


def check_names(cells: list[Cell]) -> None:
    """Refuse data sets, methods and backbones that do not exist, before anything is trained."""
    from dualrefnet.data.adapters import ADAPTERS
    from dualrefnet.models.registry import check_method

    for cell in cells:
        dataset = cell.key.dataset
        try:
            if dataset not in ADAPTERS:
                raise RecipeError(f"no data set adapter is called {dataset!r}; there are: {', '.join(ADAPTERS)}")
            check_method(cell.recipe)
        except RecipeError as error:
            raise RecipeError(f"{cell.name}: {error}") from None


# A smoke test: seconds per run on a CPU.
SMOKE = {"image.size": 32, "model.weights": "none", "training.epochs": 1, "evaluation.bootstrap": 50}
SMOKE_BACKBONE = "mobilenet_v2"

# Data and cost of a run, which a smoke test sets itself.
_NOT_IN_SMOKE = re.compile(
    r"data\.(?!rows$)|image\.size$|training\.epochs$|evaluation\.bootstrap$|seed$"
    r"|model\.(weights|target_weights|members|method|backbone)$"
)

# Targets of the auxiliary task that need a network with downloaded weights.
_NETWORK_TARGETS = ("carn_m", "ninasr_b0", "ninasr_b1", "edsr")


def smoke(suite: Suite, root: Path) -> tuple[Suite, list[str]]:
    """Return the suite as a test of the machinery that takes minutes on a CPU, and notes on what it replaces."""
    from dualrefnet.models.backbones import BACKBONES

    notes = ["a smoke test: synthetic images, random weights, one epoch; its numbers mean nothing"]
    blocks: dict[tuple[str, str, str], Block] = {}
    for block in suite.grid:
        for recipe, variant in sorted(_recipes(suite, block), key=lambda pair: block.variants.index(pair[1])):
            kept = {key: value for key, value in {**block.set, **variant.set}.items() if not _NOT_IN_SMOKE.match(key)}
            if kept.get("model.target") in _NETWORK_TARGETS:
                notes.append(f"the target {kept['model.target']} needs a download and is replaced by bicubic")
                kept["model.target"] = "bicubic"
            # How metadata is read belongs to what is compared.
            read = {name: getattr(recipe, name).model_dump(mode="json") for name in ("metadata", "modality_dropout")}
            method, backbone = recipe.model.method, recipe.model.backbone
            spec = BACKBONES.get(backbone)
            backbone = backbone if spec is not None and spec.kind == "transformer" else SMOKE_BACKBONE
            # Two data sets collapse into the sample, where their blocks are the same system: the first stays.
            blocks.setdefault(
                (method, backbone, variant.name),
                Block(
                    recipe="sample",
                    set={"data.root": str(root), **read, **SMOKE},
                    methods=(method,),
                    backbones=(backbone,),
                    variants=(Variant(name=variant.name, set=kept, paper=variant.paper or block.paper),),
                ),
            )
    # One data set is left, and one CNN.
    reference = next(iter(suite.reference.values())) if isinstance(suite.reference, dict) else suite.reference
    if reference in BACKBONES and BACKBONES[reference].kind == "cnn":
        reference = SMOKE_BACKBONE
    splits = (SplitCount(dataset="sample", protocol="grouped", set={"data.root": str(root)}),) if suite.splits else ()
    changed = {
        "name": f"{suite.name}-smoke",
        "title": f"SMOKE TEST ON SYNTHETIC IMAGES: {suite.title}",
        "description": "Synthetic images, random weights, one epoch: a test of the software; the numbers mean nothing.",
        "smoke": True,
        "reference": reference,
        "splits": splits,
        "grid": tuple(blocks.values()),
    }
    return suite.model_copy(update=changed), list(dict.fromkeys(notes))
