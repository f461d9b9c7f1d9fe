"""The commands of docs/training.md, as they stand there, on the sample data at a small size."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dualrefnet.cli import app, runs  # noqa: F401 (registers the commands)
from dualrefnet.files import write_yaml
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_page_runs(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    (ranges,) = (yaml.safe_load(text)["tune"] for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S))
    small = {"model.backbone": "efficientnet_lite0", "model.weights": "auto", "training.epochs": 1}
    # A file of that name wins over the recipe that ships.
    for name, more in {"isic_2019": {}, "pad_ufes_20": {}, "tuned.yaml": {"tune": ranges}}.items():
        recipe = load_recipe(tiny_recipe, {**small, "name": name.removesuffix(".yaml"), **more})
        write_yaml(tmp_path / name, recipe.model_dump(mode="json", exclude_unset=True))
    lines = [line for text in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) for line in text.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("dualrefnet ")]
    assert [command[0] for command in commands].count("tune") == 1
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (command, result.output, result.exception)
    out = [Path(command[command.index("--out") + 1]) for command in commands if command[0] == "train"]
    assert all(Run(folder).finished for folder in out)
    assert Run(Path("runs/pad_from_isic")).fingerprint["weights"][0]["trained_on"][0]["run"] == "isic_2019"
    assert list(Path("runs/pad_tracked/tensorboard").glob("events*"))
    tuned = load_recipe("tuning/pad/best.yaml")
    assert ranges["training.epochs"]["low"] <= tuned.training.epochs <= ranges["training.epochs"]["high"]
    assert not list(Path("tuning").rglob("predictions.csv"))
