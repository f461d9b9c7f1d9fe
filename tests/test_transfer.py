import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dualrefnet import Predictor
from dualrefnet.deploy.card import data_licence
from dualrefnet.errors import DualRefNetError
from dualrefnet.models.registry import new_model, trained_on
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.report.provenance import provenance_section
from dualrefnet.run import Run
from dualrefnet.training.train import train_recipe
from test_card import card

ISIC = {
    "run": "isic",
    "dataset": "ISIC-2019",
    "licence": "CC BY-NC 4.0",
    "citation": "Tschandl",
    "model_sha256": "0" * 64,
}


def start(recipe: Recipe, run: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Parameters and records of a new model that starts from a run, for other metadata."""
    overrides = {"model.weights": "auto", "model.init_from": str(run)}
    overrides |= {key.replace("__", "."): value for key, value in changes.items()}
    model, _, sources = new_model(load_recipe(recipe, overrides), 5, 6)
    return model.state_dict(), sources


def test_what_fits_by_name_and_shape_is_taken_or_the_encoder_alone(
    tiny_recipe: Recipe, tiny_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_file(tiny_run.weights_file)
    everything, _ = start(tiny_recipe, tiny_run.path)
    said = capsys.readouterr().err
    encoder, _ = start(tiny_recipe, tiny_run.path, model__init_parts="encoder")
    same = {name for name, value in everything.items() if name in source and torch.equal(value, source[name])}
    # Other metadata have another first layer.
    assert source.keys() - same == {"metadata_network.0.weight"}
    assert f"{len(same)} of its {len(source)} tensors are taken" in said
    assert "metadata_network.0.weight" in said
    of_encoder = {name for name in source if name.startswith("encoders.")}
    assert all(torch.equal(encoder[name], source[name]) for name in of_encoder)
    assert not torch.equal(encoder["head.hidden.weight"], source["head.hidden.weight"])


def test_an_encoder_goes_on_under_another_method_and_at_another_size(tiny_recipe: Recipe, tiny_run: Run) -> None:
    source = load_file(tiny_run.weights_file)
    state, _ = start(tiny_recipe, tiny_run.path, model__method="metablock", image__size=64)
    assert all(torch.equal(state[name], value) for name, value in source.items() if name.startswith("encoders."))


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        ({"model__init_from": "nowhere"}, None, "nowhere isn't a run"),
        (
            {},
            lambda folder: [(folder / f"{name}.json").unlink() for name in ("metrics", "fingerprint")],
            "holds no trained",
        ),
        ({}, lambda folder: (folder / "model.safetensors").unlink(), "holds no trained model"),
        ({}, lambda folder: (folder / "recipe.yaml").rename(folder / "bundle.json"), "is a bundle"),
        ({"model__backbone": "resnet50"}, None, "has mobilenet_v2, and this recipe resnet50: set model.backbone"),
        ({"image__clahe": False}, None, r"normalised otherwise \(image.clahe: True there, False now\)"),
        ({"model__weights": "none"}, None, "leave one out"),
        ({"model__method": "metadata_only"}, None, "metadata_only has none"),
    ],
    ids=["no run", "unfinished", "no parameters", "bundle", "backbone", "normalisation", "weights", "no encoder"],
)
def test_a_run_from_which_nothing_can_start_is_refused(
    changes: dict[str, Any], damage: Any, message: str, tiny_recipe: Recipe, tiny_run: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_run.path, tmp_path / "run"))
    if damage is not None:
        damage(folder)
    with pytest.raises(DualRefNetError, match=message):
        start(tiny_recipe, folder, **changes)


def test_a_run_records_from_what_it_started_and_needs_it_no_more(
    tiny_recipe: Recipe, tiny_run: Run, sample_root: Path, tmp_path: Path
) -> None:
    first = Path(shutil.copytree(tiny_run.path, tmp_path / "first"))
    values = {"model.weights": "auto", "model.init_from": str(first), "training.epochs": 1}
    values |= {"training.layer_decay": 0.7, "training.freeze_stages": 2}
    run = train_recipe(load_recipe(tiny_recipe, values), tmp_path / "second")
    shutil.rmtree(first)
    title, licence = (tiny_run.model["dataset"][name] for name in ("title", "licence"))
    (record,) = trained_on(run.fingerprint["weights"])
    assert record == {**ISIC, "run": "sample", "dataset": title, "licence": licence} | {
        "citation": tiny_run.model["dataset"]["citation"],
        "model_sha256": tiny_run.fingerprint["model_sha256"],
    }
    assert run.model["weights"] == run.fingerprint["weights"]
    assert run.model["weights"][0]["kind"] == "run"
    frozen = [
        name
        for name in load_file(run.weights_file)
        if name.startswith(("encoders.0.body.conv_stem", "encoders.0.body.blocks.1"))
    ]
    before, after = load_file(tiny_run.weights_file), load_file(run.weights_file)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(
        before["encoders.0.body.blocks.3.0.conv_pw.weight"], after["encoders.0.body.blocks.3.0.conv_pw.weight"]
    )
    image = next((sample_root / "images").iterdir())
    assert sum(Predictor.load(run.path).predict(image, {"age": 40}).probabilities.values()) == pytest.approx(1)
    assert any(cell[0].text == "trained before" for cell in provenance_section(run).items[0].rows)
    # And so on.
    _, sources = start(tiny_recipe, run.path)
    assert [one["model_sha256"] for one in trained_on(sources)] == [
        record["model_sha256"],
        run.fingerprint["model_sha256"],
    ]


def test_the_licence_of_every_data_set_is_in_the_card(tiny_run: Run) -> None:
    text = card(tiny_run, trained_on=[ISIC])
    assert "license: other\n" in text
    assert "license: other\n" not in card(tiny_run)
    both = data_licence(tiny_run.model["dataset"], [ISIC])
    for said in (text, both):
        assert all(word in said for word in ("ISIC-2019", "CC BY-NC 4.0", "**not commercially**", "Tschandl"))
        assert tiny_run.model["dataset"]["licence"] in said
