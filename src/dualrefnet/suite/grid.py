"""A suite: one YAML file that names a grid of recipes, and how it becomes cells, one a training.

What a cell's recipe says is, from weak to strong: the block's recipe, the block's `set`, the grid's axes (method,
backbone,
fold, seed), the variant's `set`, and the overrides of the command line.
"""

# also: The smoke test of a suite: the same methods and variants in minutes on a CPU, to show that everything works.

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from dualrefnet.errors import RecipeError
from dualrefnet.models.encoders import backbone_spec
from dualrefnet.recipe import Recipe, Section, StrictLoader, load_recipe, shipped_text, suggestion

# Keys of a recipe that are axes of the grid, and the block's list that holds their values.
AXES = {"model.method": "methods", "model.backbone": "backbones", "data.fold": "folds", "seed": "seeds"}


# Enough for a name of a file on every system, with room for the endings of temporary files.
LONGEST_NAME = 180


class SplitCount(Section):
    """A protocol whose rows are counted, without any training (Table 1)."""

    dataset: str
    protocol: str
    set: dict[str, Any] = Field({}, description="further keys of a recipe, such as data.root")

    @property
    def recipe(self) -> Recipe:
        """A recipe with that split."""
        return load_recipe({"name": "split", "data": {"dataset": self.dataset, "protocol": self.protocol}}, self.set)


class Lookup(Section):
    """Where the paper's numbers for a cell stand."""

    table: str | None = Field(None, coerce_numbers_to_str=True, description="3a, 3b, 4, text; empty: the suite's table")
    metrics: dict[str, str] = Field(
        {}, description="measure -> the paper's name for it, where it isn't the ordinary one"
    )


class Variant(Section):
    """A departure from the block's recipe."""

    name: str = Field("", max_length=100, pattern=r"^$|[A-Za-z0-9]", description="in tables, and in the names of runs")
    set: dict[str, Any] = Field({}, description="dotted key of a recipe -> value")
    paper: Lookup | None = None


class Block(Section):
    """A recipe, and the grid spanned over it; a list that isn't given holds the recipe's own value."""

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

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Key of a recipe -> its values, for the axes that the block names."""
        return {key: getattr(self, name) for key, name in AXES.items() if getattr(self, name) is not None}


class Suite(Section):
    """A grid of recipes and the tables to be made of it. See the YAML files in `dualrefnet/recipes/suites/`."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str
    description: str = ""
    smoke: bool = Field(
        False, description="drawn pictures in place of the data sets: shows that everything works, and nothing else"
    )
    table: str | None = Field(
        None, coerce_numbers_to_str=True, description="the paper's table: 1, 2a, 3a, 3b, 4, text ..."
    )
    reference: str | None = Field(None, description="the method, or variant, with which the others are compared")
    measures: tuple[str, ...] = Field(
        ("accuracy", "balanced_accuracy", "auc_macro_ovr"), description="columns: keys of metrics.json"
    )
    rows: Literal["method", "variant"] = Field("method", description="what a row of the printed table is")
    per_class: bool = Field(False, description="also a table by class")
    splits: tuple[SplitCount, ...] = ()
    grid: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One place of the grid.

    Attributes:
        name: unique in the suite, and the name of the recipe.
        run: folder under `runs/`: the cell's name, or that of an earlier cell with the same recipe.
        recipe: the resolved recipe.
        dataset: adapter.
        protocol: how the rows are divided.
        method: the system.
        backbone: its image encoder; of an ensemble with members these, joined by `+`.
        variant: name of the variant; empty for the recipe itself.
        fold: which fold is the test set.
        seed: of the training.
        paper: where the paper's numbers for it stand, a dump of `Lookup`; None: the suite's table.
    """

    name: str
    run: str
    recipe: Recipe
    dataset: str
    protocol: str
    method: str
    backbone: str
    variant: str
    fold: int
    seed: int
    paper: Mapping[str, Any] | None


def shipped_suites() -> list[str]:
    """Return the names of the suites inside the package, sorted."""
    folder = resources.files("dualrefnet") / "recipes" / "suites"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def suite_text(name_or_file: str | Path) -> str:
    """Return the YAML text of a shipped suite or of a file; a file of that name wins.

    Raises:
        RecipeError: there is neither.
    """
    return shipped_text("suite", name_or_file, "recipes/suites", shipped_suites())


def load_suite(name_or_file: str | Path) -> Suite:
    """Read and check a suite: a file, or the name of one that ships. Its blocks then hold their recipes themselves.

    Raises:
        RecipeError: there is neither; it isn't YAML; a key is unknown; a value is wrong; a recipe isn't there.
    """
    path, text = Path(name_or_file), suite_text(name_or_file)
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name_or_file} isn't YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{name_or_file} must hold `key: value` lines")
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            f"suite {name_or_file}: " + "; ".join(_explain(item) for item in error.errors()[:5])
        ) from None
    if not suite.grid and not suite.splits:
        raise RecipeError(f"suite {name_or_file} has neither `grid` nor `splits`: there is nothing to do")
    return with_recipes(suite, path.parent)


def with_recipes(suite: Suite, folder: Path = Path()) -> Suite:
    """Return the suite with the recipes themselves in place of their names.

    Args:
        suite: any suite.
        folder: where its recipe files are; a file there goes before a shipped recipe of that name, as everywhere.

    Raises:
        RecipeError: a recipe isn't there, or is wrong.
    """
    blocks = []
    for block in suite.grid:
        recipe = block.recipe
        source = folder / recipe if isinstance(recipe, str) and (folder / recipe).is_file() else recipe
        blocks.append(
            block.model_copy(update={"recipe": load_recipe(source).model_dump(mode="json", exclude_unset=True)})
        )
    return suite.model_copy(update={"grid": tuple(blocks)})


def override(suite: Suite, overrides: Mapping[str, Any]) -> Suite:
    """Return the suite with keys of its recipes changed in every run.

    An axis of the grid takes one value or a list: `{"seed": [0, 1, 2]}` trains everything three times.

    Raises:
        RecipeError: one root for two data sets.
    """
    axes = {
        AXES[key]: tuple(value) if isinstance(value, list) else (value,)
        for key, value in overrides.items()
        if key in AXES
    }
    plain = {key: value for key, value in overrides.items() if key not in AXES}
    blocks = []
    for block in suite.grid:
        variants = [variant.model_copy(update={"set": _without(variant.set, overrides)}) for variant in block.variants]
        update = {**axes, "set": {**_without(block.set, overrides), **plain}, "variants": tuple(variants)}
        blocks.append(_checked(block, update))
    splits = [split.model_copy(update={"set": {**split.set, **plain}}) for split in suite.splits]
    changed = suite.model_copy(update={"grid": tuple(blocks), "splits": tuple(splits)})
    if "data.root" in plain:
        datasets = {cell.dataset for cell in expand(changed)} | {split.recipe.data.dataset for split in changed.splits}
        if len(datasets) > 1:
            raise RecipeError(
                f"data.root is the folder of one data set, and {suite.name} has {' and '.join(sorted(datasets))}; "
                "set DUALREFNET_DATA to the folder that holds both"
            )
    return changed


def expand(suite: Suite) -> list[Cell]:
    """Return the cells of a suite, in the order of the file. Cells with equal recipes share a run.

    Raises:
        RecipeError: a recipe is wrong, or two cells can't be told apart.
    """
    cells: dict[str, Cell] = {}
    runs: dict[str, str] = {}
    for block in suite.grid:
        for recipe, variant in _recipes(suite, block):
            data = recipe.data
            parts = [
                data.dataset,
                recipe.model.method,
                recipe.model.backbone,
                _slug(variant.name),
                f"fold{data.fold}",
                f"seed{recipe.seed}",
            ]
            name = "-".join(part for part in parts if part)
            if len(name) > LONGEST_NAME:
                raise RecipeError(
                    f"{suite.name}: the name {name} is too long for a folder; shorten the name of the variant"
                )
            recipe = recipe.model_copy(update={"name": name})
            run = runs.setdefault(recipe.model_dump_json(exclude={"name", "description"}), name)
            lookup = variant.paper or block.paper
            paper = lookup.model_dump(exclude_none=True) if lookup else None
            backbone = "+".join(recipe.model.members) or recipe.model.backbone
            system = (data.dataset, data.protocol, recipe.model.method, backbone, variant.name)
            cell = Cell(name, run, recipe, *system, data.fold, recipe.seed, paper)
            if cells.setdefault(name, cell) != cell:
                differences = (
                    ", ".join(_differing(cells[name].recipe.model_dump(), recipe.model_dump())) or "the paper's numbers"
                )
                raise RecipeError(
                    f"{suite.name}: two cells are called {name} and differ in {differences}; give the variants of their blocks other names"
                )
    return list(cells.values())


def check_names(cells: list[Cell]) -> None:
    """Refuse data sets, methods and backbones that don't exist, before anything is trained.

    Raises:
        RecipeError: naming the cell, and those that there are.
    """
    from dualrefnet.data.adapters import ADAPTERS
    from dualrefnet.models.encoders import backbone_spec
    from dualrefnet.models.registry import check_method

    for cell in cells:
        model = cell.recipe.model
        try:
            if cell.dataset not in ADAPTERS:
                raise RecipeError(f"no data set adapter is called {cell.dataset!r}; there are: {', '.join(ADAPTERS)}")
            if check_method(cell.recipe).reads_image:
                for backbone in (model.backbone, *model.members):
                    backbone_spec(backbone)
        except RecipeError as error:
            raise RecipeError(f"{cell.name}: {error}") from None


def differences(before: Suite, now: Suite) -> list[str]:
    """Name the keys in which two suites differ, and how."""
    old, new = (_flat(suite.model_dump(mode="json")) for suite in (before, now))
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} now" for key in {**old, **new} if old.get(key) != new.get(key)
    ]


def _recipes(suite: Suite, block: Block) -> Iterator[tuple[Recipe, Variant]]:
    """Give every recipe of a block with its variant; fold and seed change fastest, so that systems stay together."""
    base, axes = load_recipe(block.recipe), block.axes
    systems = {key: values for key, values in axes.items() if key in ("model.method", "model.backbone")}
    repeats = {key: values for key, values in axes.items() if key not in systems}
    for system in product(*systems.values()):
        for variant in block.variants:
            for repeat in product(*repeats.values()):
                chosen = {**dict(zip(systems, system, strict=True)), **dict(zip(repeats, repeat, strict=True))}
                try:
                    yield load_recipe(base, {**block.set, **chosen, **variant.set}), variant
                except RecipeError as error:
                    where = ", ".join(str(value) for value in (variant.name, *chosen.values()) if value != "")
                    raise RecipeError(f"suite {suite.name}{f' ({where})' if where else ''}: {error}") from None


def _checked(block: Block, update: dict[str, Any]) -> Block:
    """Change a block, and check the change: an axis of the command line may hold anything."""
    try:
        return Block.model_validate({**block.model_dump(), **update})
    except ValidationError as error:
        keys = {name: key for key, name in AXES.items()}
        item = error.errors()[0]
        raise RecipeError(f"{keys.get(str(item['loc'][0]), item['loc'][0])}: {item['msg']}") from None


def _without(values: dict[str, Any], gone: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in gone}


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        return {key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def _differing(old: Any, new: Any) -> list[str]:
    before, after = _flat(old), _flat(new)
    return [key for key in after if before.get(key) != after[key]]


def _explain(item: Any) -> str:
    """Say what is wrong at a place of a suite file; an unknown key with a suggestion."""
    *place, last = item["loc"]
    key = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg'].removeprefix('Value error, ')}"
    section: type[BaseModel] = Suite
    for part in place:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next(
                kind
                for kind in (annotation, *typing.get_args(annotation))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            )
    legal = list(section.model_fields)
    return f"unknown key {key!r}{suggestion(str(last), legal)} (keys there: {', '.join(legal)})"


# What a smoke test trains on: seconds a run on a CPU.
SMOKE = {"image.size": 32, "model.weights": "none", "training.epochs": 1, "evaluation.bootstrap": 50}


SMOKE_BACKBONE = "mobilenet_v2"


# These stand for the data, and for the cost of a run, which a smoke test sets itself.
_NOT_IN_SMOKE = re.compile(
    r"data\.(?!rows$)|image\.size$|training\.epochs$|evaluation\.bootstrap$|model\.(weights|target_weights|members|method|backbone)$|seed$"
)


# Targets of the auxiliary task that a network with downloaded weights makes.
_NETWORK_TARGETS = ("carn_m", "ninasr_b0", "ninasr_b1", "edsr")


def smoke(suite: Suite, root: Path) -> tuple[Suite, list[str]]:
    """Return the suite as a test of the machinery that takes minutes on a CPU, and remarks on what it leaves out.

    Methods and variants stay; data set, recipe, CNNs, size and length become the cheapest; folds and seeds the first.

    Args:
        suite: any suite.
        root: where the drawn sample is, or will be drawn.
    """

    def cheap(backbone: str) -> str:
        return SMOKE_BACKBONE if backbone_spec(backbone).kind == "cnn" else backbone

    remarks = ["a smoke test: drawn pictures, encoders from scratch, one epoch; its numbers mean nothing"]
    blocks: dict[tuple[str, str, str], Block] = {}
    for block in suite.grid:
        recipe = load_recipe(block.recipe)
        model = recipe.model
        # How metadata are read belongs to what is compared.
        read = {name: getattr(recipe, name).model_dump(mode="json") for name in ("metadata", "modality_dropout")}
        for variant in block.variants:
            given = {"model.method": model.method, "model.backbone": model.backbone, **block.set, **variant.set}
            methods = (
                (given["model.method"],) if "model.method" in variant.set else block.methods or (given["model.method"],)
            )
            backbones = (
                (given["model.backbone"],)
                if "model.backbone" in variant.set
                else block.backbones or (given["model.backbone"],)
            )
            kept = {key: value for key, value in {**block.set, **variant.set}.items() if not _NOT_IN_SMOKE.match(key)}
            if kept.get("model.target") in _NETWORK_TARGETS:
                remarks.append(f"the target {kept['model.target']} needs a download: bicubic in its place")
                kept["model.target"] = "bicubic"
            for method, backbone in product(methods, dict.fromkeys(map(cheap, backbones))):
                # Blocks of two data sets, of which the first is kept: on the drawn sample they are the same system.
                blocks.setdefault(
                    (method, backbone, variant.name),
                    Block(
                        recipe="sample",
                        set={"data.root": str(root), **read, **SMOKE},
                        methods=(method,),
                        backbones=(backbone,),
                        variants=(Variant(name=variant.name, set=kept),),
                    ),
                )
    splits = (SplitCount(dataset="sample", protocol="grouped", set={"data.root": str(root)}),) if suite.splits else ()
    changed = {
        "name": f"{suite.name}-smoke",
        "title": f"SMOKE TEST ON DRAWN PICTURES: {suite.title}",
        "description": "Drawn pictures, encoders from scratch, one epoch: shows that everything works; the numbers mean nothing.",
        "smoke": True,
    }
    return suite.model_copy(update={**changed, "splits": splits, "grid": tuple(blocks.values())}), list(
        dict.fromkeys(remarks)
    )
