import errno
import io
import json
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from dualrefnet import Predictor
from dualrefnet.cli import app, deployment  # noqa: F401 (the module registers the commands)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.deploy import export as export_module
from dualrefnet.deploy import hub
from dualrefnet.deploy.export import check_target, export_run
from dualrefnet.deploy.hub import FILES, check_bundle
from dualrefnet.deploy.network import ExportedModel, ProgramNetwork, TorchNetwork, trace, write_onnx, write_program
from dualrefnet.deploy.parity import Cases, predict_cases
from dualrefnet.errors import DataError, RunError
from dualrefnet.files import atomic_folder, sha256_of_file
from dualrefnet.models.backbones import BACKBONES
from dualrefnet.models.base import Architecture, Method
from dualrefnet.models.encoders import Encoder, WeightsSource
from dualrefnet.models.registry import METHODS, new_model
from dualrefnet.recipe import ModelSection, Recipe, load_recipe
from dualrefnet.report.provenance import run_title
from dualrefnet.run import Run
from dualrefnet.runtime.bundle import OnnxNetwork

SIDE, WIDTH, CLASSES, FEATURES = 32, 6, 3, 32
NORMALISATION = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
# Each takes four seconds, most of which torch's exporter needs.
QUICK = (("dualrefnet", True), ("metadata_only", False))
EVERY = [
    pytest.param(name, tokens, marks=[] if (name, tokens) in QUICK else [pytest.mark.slow])
    for name in METHODS
    for tokens in (False, True)
]


class TinyBody(nn.Module):
    """Stands for timm's network: five maps, the last of which is the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 4, 4, 6, 8, FEATURES)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU6())
            for before, after in pairwise(channels)
        )
        self.num_features = FEATURES
        self.feature_info = [{"num_chs": count} for count in channels[1:]]

    def forward_features(self, image: Tensor) -> Tensor:
        return self.forward_intermediates(image, [])[0]

    def forward_intermediates(self, image: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return image, [maps[index] for index in indices]


def tiny_method(name: str, tokens: bool = False, width: int = WIDTH) -> tuple[Method, Architecture]:
    """A method with random weights on tiny encoders, in evaluation mode."""
    torch.manual_seed(0)
    section = ModelSection.model_validate({"method": name, "backbone": "mobilenet_v2", "decoder": "bottleneck"})
    architecture = Architecture(
        image_size=SIDE, metadata_width=width, classes=CLASSES, section=section, missing_tokens=tokens
    )
    kind, encoders = METHODS[name].network, []
    for position in range(3 if name == "ensemble" else int(kind.reads_image)):
        # The second and third encoder of an ensemble expect images of another mean and deviation.
        source = WeightsSource(
            "none", "stand-in", None, (0.5, 0.4, 0.3 + position / 10), (0.2, 0.3, 0.4 + position / 10)
        )
        encoder = Encoder("mobilenet_v2", TinyBody(), source, kind.reads_taps, position)
        encoder.features = FEATURES
        encoders.append(encoder)
    method = kind(architecture, encoders).eval()
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, std=0.1)
    if method.missing is not None:
        for token in method.missing.parameters():
            nn.init.normal_(token)
    if hasattr(method, "decision"):
        method.decision.weights.copy_(torch.tensor([0.5, 0.25, 0.25])[: len(method.decision.weights)])
    return method, architecture


def written(method: Method, architecture: Architecture, folder: Path) -> tuple[ExportedModel, Path, Path]:
    model = ExportedModel(method, architecture, NORMALISATION)
    program = trace(model)
    onnx_file, program_file = folder / "model.onnx", folder / "model.pt2"
    write_onnx(program, model, onnx_file, {"notice": "stand-in"})
    write_program(program, program_file)
    return model, onnx_file, program_file


def random_cases(count: int, side: int = SIDE, width: int = WIDTH, tokens: bool = False) -> Cases:
    random = np.random.default_rng(count)
    forms = random.normal(size=(count, width)).astype(np.float32)
    if tokens:
        forms[0, ::2] = np.nan
    return Cases(
        random.integers(0, 256, (count, side, side, 3), dtype=np.uint8), forms, random.integers(0, CLASSES, count)
    )


@pytest.mark.parametrize(("name", "tokens"), EVERY)
def test_every_method_predicts_as_in_torch_for_any_number_of_images(name: str, tokens: bool, tmp_path: Path) -> None:
    method, architecture = tiny_method(name, tokens)
    model, onnx_file, program_file = written(method, architecture, tmp_path)
    reads = METHODS[name].reads_image
    wanted = [*(["image"] if reads else []), *(["absent"] if reads and tokens else []), "metadata"]
    assert list(model.inputs) == wanted
    onnx = OnnxNetwork(onnx_file)
    assert [one.name for one in onnx.session.get_inputs()] == wanted
    assert [one.name for one in onnx.session.get_outputs()] == (["logits", "vector"] if reads else ["logits"])
    assert {one.shape[0] for one in (*onnx.session.get_inputs(), *onnx.session.get_outputs())} == {"N"}
    trained, program = (
        TorchNetwork(method, SIDE, NORMALISATION, torch.device("cpu")),
        ProgramNetwork(program_file, model.inputs),
    )
    for count in (1, 3):
        cases = random_cases(count, tokens=tokens)
        cases = cases if reads else Cases(None, cases.metadata)
        absent = np.arange(count) % 2 == 1 if reads and tokens else np.zeros(count, dtype=bool)
        answers = [predict_cases(network, cases, absent) for network in (trained, onnx, program)]
        for answer in answers[1:]:
            np.testing.assert_allclose(answer.logits, answers[0].logits, atol=1e-4, rtol=1e-4)
            if reads:
                np.testing.assert_allclose(answer.vectors, answers[0].vectors, atol=1e-4, rtol=1e-4)
                assert np.isnan(answer.vectors).all(axis=1).tolist() == absent.tolist()
            else:
                assert answer.vectors is None


def test_files_hold_no_decoder_no_pickle_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    method, architecture = tiny_method("dualrefnet", tokens=True)
    assert any(name.startswith("decoder") for name in method.state_dict())
    _, onnx_file, program_file = written(method, architecture, tmp_path)
    assert any(name.startswith("decoder") for name in method.state_dict()), "the trained model must stay as it is"
    here = str(Path(__file__).parent.parent).encode()
    assert here not in onnx_file.read_bytes()
    with zipfile.ZipFile(program_file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert len(members) > 10
    # A pickle begins with its protocol, torch's own files (which hold one) with a zip's mark.
    assert [
        name for name, content in members.items() if content[:1] == b"\x80" or zipfile.is_zipfile(io.BytesIO(content))
    ] == []
    assert [name for name, content in members.items() if here in content or b"decoder" in content] == []
    assert not (tmp_path / "model.onnx.data").exists()
    # Torch's own writer would end the process.
    with pytest.raises(OSError, match="No space left"):
        write_program(torch.export.load(program_file), Path("/dev/full"))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_is_exported(backbone: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {"model.method": "dualrefnet", "model.backbone": backbone, "model.weights": "none", "image.size": 64}
    method, architecture, _ = new_model(load_recipe({"name": "contract"}, values), WIDTH, CLASSES)
    _, onnx_file, _ = written(method.eval(), architecture, tmp_path)
    trained = TorchNetwork(method, 64, NORMALISATION, torch.device("cpu"))
    for count in (1, 3):
        cases = random_cases(count, side=64)
        np.testing.assert_allclose(
            predict_cases(OnnxNetwork(onnx_file), cases).logits, predict_cases(trained, cases).logits, atol=1e-4
        )


@pytest.fixture(scope="module")
def bundle(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_run`; don't change it."""
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    export_run(tiny_run, out)
    return out


@pytest.fixture(scope="module")
def form_run(tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the form alone, whose data have vanished since."""
    from dualrefnet.training.train import train_recipe

    root = tmp_path_factory.mktemp("moved")
    shutil.copytree(tiny_recipe.data.root, root / "data")
    recipe = load_recipe(
        tiny_recipe, {"model.method": "metadata_only", "data.root": str(root / "data"), "training.epochs": 1}
    )
    run = train_recipe(recipe, root / "run")
    shutil.rmtree(root / "data")
    return run


@pytest.mark.slow
def test_a_bundle_holds_what_it_should_and_says_what_it_is(tiny_run: Run, bundle: Path) -> None:
    modules = {f"runtime/{path.name}" for path in (Path(export_module.__file__).parent.parent / "runtime").glob("*.py")}
    found = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert found == set(FILES) | modules
    assert list(bundle.parent.iterdir()) == [bundle], "nothing may be left beside it"
    about, description = json.loads((bundle / "bundle.json").read_text()), tiny_run.model
    assert (about["format"], about["name"], about["classes"]) == (1, tiny_run.recipe.name, description["classes"])
    assert about["image"] == description["preprocessing"]["image"]
    assert about["metadata"] == description["metadata"]
    assert about["calibration"] == tiny_run.calibration.to_json()
    assert about["measured"] == tiny_run.metrics
    assert about["dataset"]["drawn"] is True
    assert about["class_names"]["MEL"] == "melanoma"
    assert (about["reads_image"], about["learned_tokens"]) == (True, False)
    for network in about["networks"].values():
        assert network["sha256"] == sha256_of_file(bundle / network["file"])
        assert network["bytes"] == (bundle / network["file"]).stat().st_size
    assert about["networks"]["float32"]["parity"]["max_probability_difference"] < 1e-4
    assert about["networks"]["float32"]["parity"]["cases"] == (tiny_run.split["split"] == "val").sum()
    check_bundle(bundle)
    networks, splits, validation = about["networks"], tiny_run.split["split"], tiny_run.metrics["validation"]
    assert networks["int8"]["bytes"] < networks["float32"]["bytes"] / 2
    measured = networks["int8"]["measured"]
    assert (measured["cases"], networks["int8"]["calibrated_on"]) == (
        (splits == "val").sum(),
        (splits == "train").sum(),
    )
    for name in ("accuracy", "balanced_accuracy"):
        assert measured["float32"][name] == pytest.approx(validation[name])
    assert 0 < measured["max_probability_difference"] < 0.5


@pytest.mark.parametrize("backbone", ["timm:resnet10t", "timm:test_vit"])
def test_an_encoder_of_timm_goes_the_whole_way(backbone: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    from dualrefnet.training.train import train_recipe

    changes = {"model.backbone": backbone, "training.epochs": 1, "metadata.tier": "M2", "metadata.imputation": "token"}
    run = train_recipe(load_recipe(tiny_recipe, changes), tmp_path / "run")
    export_run(run, tmp_path / "bundle", int8=False, accept_missingness_shortcut=True)
    image = next((Path(str(tiny_recipe.data.root)) / "images").iterdir())
    ours, theirs = (Predictor.load(model).predict(image, {"age": 61}) for model in (run, tmp_path / "bundle"))
    assert list(theirs.probabilities.values()) == pytest.approx(list(ours.probabilities.values()), abs=1e-4)
    assert run_title(run)[1].startswith(backbone.removeprefix("timm:"))


@pytest.mark.slow
def test_a_bundle_predicts_as_its_run_does_and_without_dualrefnet(
    tiny_run: Run, bundle: Path, sample_root: Path
) -> None:
    run, exported = Predictor.load(tiny_run), Predictor.load(bundle)
    table = load_dataset("sample", sample_root).table.head(4)
    for _, row in table.iterrows():
        form = {"age": 61, "region": row["region"]}
        ours, theirs = run.predict(row["image_path"], form), exported.predict(row["image_path"], form)
        assert list(theirs.probabilities.values()) == pytest.approx(list(ours.probabilities.values()), abs=1e-4)
        assert (theirs.label, theirs.warnings) == (ours.label, ours.warnings)
        assert theirs.out_of_scope == pytest.approx(ours.out_of_scope, abs=1e-3)
        quick = Predictor.load(bundle, variant="int8").predict(row["image_path"], form)
        assert list(quick.probabilities.values()) == pytest.approx(list(ours.probabilities.values()), abs=0.3)
    # Alone, by its own copy of the runtime; `--form` is the older name of the option.
    image, code = (
        next((sample_root / "images").iterdir()),
        "import runpy, sys; sys.modules['dualrefnet'] = sys.modules['torch'] = None; ",
    )
    code += "runpy.run_module('runtime', run_name='__main__')"
    for option in ("--metadata", "--form"):
        command = [sys.executable, "-c", code, str(image), option, '{"age": 61}']
        done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        expected = run.predict(image, {"age": 61}).probabilities
        assert json.loads(done.stdout)["probabilities"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_bundle_without_its_score_says_so_once_and_with_every_prediction(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    (folder / "out_of_scope.safetensors").unlink()
    image = np.full((64, 64, 3), 99, np.uint8)
    for prediction in Predictor.load(folder).predict_many([image, image], [{}, {}]):
        assert prediction.out_of_scope is None
        assert "not checked" in prediction.warnings[0]
    assert capfd.readouterr().err.count("no out-of-distribution score") == 1


def test_without_data_parity_is_checked_on_synthetic_cases_and_a_bundle_is_replaced(
    form_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "form"
    about = export_run(form_run, out)
    assert "synthetic" in about["networks"]["float32"]["parity"]["checked_on"]
    assert "synthetic images instead" in capsys.readouterr().err
    assert (list(about["networks"]), about["no_int8"]) == (["float32"], "this model reads no image")
    assert not (out / "out_of_scope.safetensors").exists()
    (out / "stale.txt").write_text("of the last export")
    with pytest.raises(RunError, match="--no-int8"):
        export_run(form_run, out, int8=True)
    assert (out / "stale.txt").exists(), "a failed export must leave the old bundle"
    export_run(form_run, out)
    assert not (out / "stale.txt").exists()
    assert list(out.parent.iterdir()) == [out]
    prediction = Predictor.load(out).predict(None, {"age": 61})
    assert sum(prediction.probabilities.values()) == pytest.approx(1)


def test_the_command_exports_and_sends(form_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[Path, str, dict[str, object]]] = []
    monkeypatch.setattr(
        hub, "push_bundle", lambda folder, name, **options: sent.append((folder, name, options)) or "https://hub/1"
    )
    out = tmp_path / "bundle"
    result = CliRunner().invoke(
        app, ["export", str(form_run.path), "--out", str(out), "--no-int8", "--push-to", "org/name"]
    )
    assert result.exit_code == 0, result.output
    assert sent == [(out, "org/name", {"private": True})]
    assert "https://hub/1" in result.output
    assert json.loads((out / "bundle.json").read_text())["no_int8"]


def test_an_export_that_predicts_otherwise_fails_and_leaves_nothing(
    form_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: ExportedModel):
        nn.init.constant_(model.method.head.classifier.bias, 0.0)[0] += 0.1
        return trace(model)

    monkeypatch.setattr(export_module, "trace", lambda model: other(model))
    with pytest.raises(RunError, match=r"ONNX file doesn't predict as the trained model.*0\.001"), torch.no_grad():
        export_run(form_run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_runs_that_nobody_could_use_are_refused(tiny_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run.path, copy)
    description = json.loads((copy / "model.json").read_text())
    description["metadata"] |= {"leaked_classes": description["classes"], "imputer": None}
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match="from the diagnosis"):
        export_run(Run(copy), tmp_path / "bundle")
    (copy / "metrics.json").unlink()
    with pytest.raises(RunError, match="isn't finished"):
        export_run(Run(copy), tmp_path / "bundle")


def _write_half(folder: Path, error: BaseException) -> None:
    (folder / "half").write_text("half")
    raise error


def test_what_lies_at_the_target_is_never_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    check_target(tmp_path / "folder")
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name, words in (("file", "is a file"), ("folder", "isn't a bundle")):
        with pytest.raises(RunError, match=words):
            check_target(tmp_path / name)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as made:
        _write_half(made, KeyboardInterrupt())
    with pytest.raises(DataError, match="disk is full"), atomic_folder(tmp_path / "folder") as made:
        _write_half(made, OSError(errno.ENOSPC, "No space left on device"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file",
        "folder",
        "folder/notes.txt",
    ]
