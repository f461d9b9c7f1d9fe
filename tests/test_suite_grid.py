import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dualrefnet.cli import app, reports  # noqa: F401 (the module registers the commands)
from dualrefnet.errors import RecipeError
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.suite.grid import (
    Block,
    Suite,
    Variant,
    check_names,
    expand,
    load_suite,
    override,
    shipped_suites,
    smoke,
)
from dualrefnet.suite.results import reported

# Suite -> cells, runs.
SHIPPED = {
    "table1": (0, 0),
    "table2": (4, 4),
    "table3a": (35, 35),
    "table3b": (25, 25),
    "table4": (6, 6),
    "figure1e": (24, 22),
    "figure7": (8, 8),
    "ablations": (7, 7),
    "readings": (28, 28),
}
CNNS = ["vgg13", "resnet50", "efficientnet_b4", "mobilenet_v2", "densenet121"]
METHODS_3A = ["no_metadata", "concat", "metanet", "metablock", "visual", "auxnet", "dualrefnet"]


def suite_of(*blocks: Block) -> Suite:
    return Suite(name="s", title="S", grid=blocks)


def write(folder: Path, text: str) -> Path:
    (folder / "suite.yaml").write_text(text)
    return folder / "suite.yaml"


@pytest.mark.parametrize("name", shipped_suites())
def test_every_shipped_suite_is_legal_and_those_of_the_paper_are_complete(name: str) -> None:
    suite = load_suite(name)
    cells = expand(suite)
    check_names(cells)
    assert suite.name == name
    assert suite.title
    assert suite.description
    rows = {cell.key.method if suite.rows == "method" else cell.key.variant for cell in cells}
    for dataset in {cell.key.dataset for cell in cells}:
        encoders = {cell.key.backbone for cell in cells if cell.key.dataset == dataset}
        assert suite.reference is None or suite.reference_of(dataset) in rows | encoders
    if name in SHIPPED:
        assert (len(cells), len({cell.run for cell in cells})) == SHIPPED[name]
        protocols = {cell.key.protocol for cell in cells} | {split.protocol for split in suite.splits}
        assert protocols == ({"grouped"} if name == "readings" else {"paper"})
        # A suite on the paper's splits must say that they leak.
        assert protocols != {"paper"} or "leak" in suite.description


def test_the_tables_have_the_paper_s_cells_and_every_lookup_finds_its_number() -> None:
    assert set(SHIPPED) <= set(shipped_suites())
    cells = [(cell.key.method, cell.key.backbone) for cell in expand(load_suite("table3a"))]
    assert cells == [(method, backbone) for method in METHODS_3A for backbone in CNNS]
    for table in ("table3a", "table3b", "table4"):
        suite = load_suite(table)
        for cell in expand(suite):
            assert reported(cell.key.dataset, suite.table, cell.key.method, cell.key.backbone, "accuracy"), cell.name
    for name in ("table2", "figure7", "ablations"):
        looked = [
            cell for cell in expand(load_suite(name)) if cell.paper and {*cell.key.backbone.split("+")} <= {*CNNS}
        ]
        assert looked
        for cell in looked:
            if (cell.key.dataset, cell.key.method) == ("isic_2019", "auxnet"):
                continue  # Not in Table 3b.
            place = (cell.key.dataset, cell.paper.table, cell.key.method, cell.key.backbone, "balanced_accuracy")
            assert reported(*place, cell.paper.metrics.get("balanced_accuracy")), cell.name


@settings(max_examples=50)
@given(
    methods=st.lists(
        st.sampled_from(["dualrefnet", "no_metadata", "metadata_only"]), min_size=1, max_size=3, unique=True
    ),
    backbones=st.lists(st.sampled_from(CNNS), min_size=1, max_size=4, unique=True),
    folds=st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3, unique=True),
    variants=st.dictionaries(
        st.text(st.sampled_from("abcXYZ019"), min_size=1, max_size=6), st.integers(1, 3), min_size=1, max_size=3
    ),
)
def test_the_grid_is_the_product_of_its_axes(
    methods: list[str], backbones: list[str], folds: list[int], seeds: list[int], variants: dict[str, int]
) -> None:
    block = Block(
        recipe="pad_ufes_20",
        set={"data.protocol": "grouped-cv"},
        methods=methods,
        backbones=backbones,
        folds=folds,
        seeds=seeds,
        variants=[Variant(name=name, set={"training.epochs": epochs}) for name, epochs in variants.items()],
    )
    cells = expand(suite_of(block))
    systems = len(methods) * len(backbones) * len(folds) * len(seeds)
    assert len(cells) == systems * len(variants)
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({cell.run for cell in cells}) == systems * len(set(variants.values())), "equal recipes must share a run"
    by_name = {cell.name: cell for cell in cells}
    for cell in cells:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", cell.name)
        assert cell.recipe.name == cell.name
        assert by_name[cell.run].run == cell.run, "a run is named by its first cell"
        assert by_name[cell.run].recipe.model_dump(exclude={"name"}) == cell.recipe.model_dump(exclude={"name"})
        assert (cell.key.method, cell.key.backbone) == (cell.recipe.model.method, cell.recipe.model.backbone)
        assert cell.recipe.training.epochs == variants[cell.key.variant]


def test_an_override_of_an_axis_takes_a_list_and_one_root_for_two_data_sets_is_refused() -> None:
    overrides = {"seed": [0, 1, 2], "model.backbone": "mobilenet_v2", "data.root": "/there"}
    suite = override(load_suite("table3a"), overrides)
    cells = expand(suite)
    assert len(cells) == 7 * 3
    assert {(cell.key.backbone, cell.recipe.data.root) for cell in cells} == {("mobilenet_v2", "/there")}
    with pytest.raises(RecipeError, match="seed"):
        override(suite, {"seed": "many"})
    for name in ("table1", "table2"):
        with pytest.raises(RecipeError, match="isic_2019 and pad_ufes_20; set DUALREFNET_DATA"):
            override(load_suite(name), {"data.root": "/there"})


def test_different_cells_of_one_name_are_refused_and_a_repeated_one_is_one() -> None:
    block = Block(recipe="pad_ufes_20")
    assert len(expand(suite_of(block, block))) == 1
    with pytest.raises(RecipeError, match=r"differ in training\.epochs"):
        expand(suite_of(block, Block(recipe="pad_ufes_20", set={"training.epochs": 3})))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gird: []", r"unknown key 'gird'; did you mean 'grid'"),
        ("grid: [{recipe: sample, method: [auxnet]}]", r"'grid.0.method'; did you mean 'methods'"),
        ("grid: [{recipe: sample, variants: [{nam: x}]}]", r"variants.0.nam'; did you mean 'name'"),
        ("grid: [{recipe: sampel}]", r"did you mean 'sample'"),
        ("description: nothing", "neither `grid` nor `splits`"),
        ("name: t", "stands twice"),
        ("grid: [{recipe: sample, seeds: []}]", "seeds"),
    ],
)
def test_a_wrong_suite_file_is_refused_with_a_hint(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        load_suite(write(tmp_path, f"name: s\ntitle: S\n{text}\n"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model.method": "dualrefnt"}, "dualrefnet"),
        ({"model.backbone": "resnet5"}, "did you mean 'resnet50'"),
        ({"model.method": "ensemble", "model.members": ["vgg13", "vgg31", "vgg13"]}, "did you mean 'vgg13'"),
        ({"data.dataset": "pad"}, "pad_ufes_20"),
        ({"model.method": "metablock", "metadata.tier": "M0"}, "needs metadata"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_trained(values: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_names(expand(suite_of(Block(recipe="pad_ufes_20", set=values))))


@pytest.mark.parametrize("name", shipped_suites())
def test_a_smoke_test_keeps_methods_and_variants_and_is_cheap(name: str, tmp_path: Path) -> None:
    suite = load_suite(name)
    small, notes = smoke(suite, tmp_path / "data")
    cells, full = expand(small), expand(suite)
    check_names(cells)
    assert {(cell.key.method, cell.key.variant) for cell in cells} == {(c.key.method, c.key.variant) for c in full}
    named = {backbone for cell in full for backbone in cell.key.backbone.split("+")}
    transformers = {backbone for backbone in named if BACKBONES[backbone].kind == "transformer"}
    assert transformers <= {cell.key.backbone for cell in cells} <= {"mobilenet_v2"} | transformers
    for cell in cells:
        recipe = cell.recipe
        assert (cell.key.dataset, cell.key.protocol, cell.fold, cell.seed) == ("sample", "grouped", 0, 0)
        assert (recipe.image.size, recipe.model.weights, recipe.training.epochs) == (32, "none", 1)
        assert recipe.model.members == ()
        assert recipe.model.target in ("bilinear", "bicubic")
    assert any("edsr" in note for note in notes) == (name == "figure1e")
    assert small.smoke
    assert [split.dataset for split in small.splits] == (["sample"] if suite.splits else [])


def test_a_dry_run_lists_every_run_and_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUALREFNET_DATA", raising=False)
    result = CliRunner().invoke(app, ["suite", "table3b", "--dry-run", "training.epochs=2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == 25 + 1
    assert lines[0].split()[0] == "isic_2019-concat-vgg13-fold0-seed0"
    result = CliRunner().invoke(app, ["suite", "figure1e", "--dry-run", "--smoke", "data.root=/there"])
    assert "is the run" in result.output
    assert "data.root is ignored" in result.output
    assert list(tmp_path.iterdir()) == []
