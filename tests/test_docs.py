import importlib
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import typer
import yaml
from typer.testing import CliRunner

import dualrefnet
import dualrefnet.cli
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.csv_table import TableDescription
from dualrefnet.data.protocols import leakage, split_dataset
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.errors import DataError, RunError, install_hint
from dualrefnet.recipe import Recipe, load_recipe, parse_overrides, shipped_recipes
from dualrefnet.run import Run

ROOT = Path(__file__).parents[1]
OWN_DATA = ROOT / "docs" / "bring-your-own-data.md"
DOCUMENTS = sorted(
    [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
)
SECTIONS = [name for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(document, *languages):
    """Return the fenced blocks of some languages."""
    return [text for language, text in FENCE.findall(document.read_text(encoding="utf-8")) if language in languages]


def inline(document):
    """Return what stands between single backticks outside the blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", document.read_text(encoding="utf-8")))


def shell_lines(document, program):
    """Return the commands of a program in the shell blocks, with their arguments apart."""
    text = "\n".join(blocks(document, "bash", "sh", "shell", "console")).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    lines += [code for code in inline(document) if re.match(rf"{program} \S+ ", code)]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def exists(dotted):
    """Find a module, an attribute of one, or a field of a class, by its full name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            if name in getattr(found, "__annotations__", {}) and not hasattr(found, name):
                return name == parts[-1]
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def command_line():
    for module in pkgutil.iter_modules(dualrefnet.cli.__path__):
        importlib.import_module(f"dualrefnet.cli.{module.name}")
    return typer.main.get_command(dualrefnet.cli.app)


def parse(arguments):
    """Parse a command as the command line would, without running it; raises if the command or an option is unknown."""
    group = command_line()
    if arguments[0].startswith("-"):
        return
    command = group.get_command(typer.Context(group), arguments[0])
    assert command is not None, f"there is no command {arguments[0]}"
    # The folder of an example isn't there; it is looked for when all options are known.
    with suppress(RunError, DataError):
        command.make_context(arguments[0], list(arguments[1:]))


@every_document
def test_every_name_of_the_package_exists(document):
    names = [re.match(r"dualrefnet(\.\w+)+", code) for code in inline(document)]
    missing = [match[0] for match in names if match and not exists(match[0])]
    assert not missing


def test_a_name_that_does_not_exist_is_noticed():
    assert exists("dualrefnet.data.schema.MetadataField.kind")
    assert not exists("dualrefnet.data.schema.MetadataField.sort")
    assert not exists("dualrefnet.data.nowhere")


@every_document
def test_every_recipe_key_exists_and_takes_the_value(document):
    pattern = re.compile(rf"({'|'.join(SECTIONS)})\.(\w+)(=\S+)?")
    for code in inline(document):
        match = pattern.fullmatch(code)
        if match is None or match[2] in ("csv", "json", "yaml", "safetensors", "md", "onnx", "pt2"):
            continue
        assert match[2] in Recipe.model_fields[match[1]].annotation.model_fields, code
        # These are only legal beside another key; whole commands are checked below.
        if match[3] and "DIR" not in match[3] and match[2] not in ("fold", "rows", "allow_leak"):
            load_recipe("pad_ufes_20_m3", parse_overrides([code]))


@every_document
def test_every_python_block_compiles(document):
    for number, code in enumerate(blocks(document, "python")):
        compile(code, f"{document.name}[{number}]", "exec")
        for module, names in re.findall(r"^from (dualrefnet[\w.]*) import (.+)$", code, re.MULTILINE):
            assert all(exists(f"{module}.{name.split(' as ')[0].strip()}") for name in names.split(",")), code


@every_document
def test_every_command_parses(document):
    # Prose may name a command without its arguments.
    named = {code.split()[1] for code in inline(document) if re.fullmatch(r"dualrefnet [a-z]+", code)}
    assert named <= set(command_line().commands)
    for arguments in shell_lines(document, "dualrefnet"):
        parse(arguments)
        if arguments[0] in ("train", "prepare") and len(arguments) > 1:
            overrides = [argument for argument in arguments[2:] if re.match(r"[a-z_]+\.[a-z_]+=", argument)]
            load_recipe(arguments[1] if arguments[1] in shipped_recipes() else "sample", parse_overrides(overrides))


@pytest.mark.parametrize("arguments", [["nonsense"], ["check"], ["check", "sample", "--nonsense"]])
def test_a_wrong_command_is_noticed(arguments):
    with pytest.raises(Exception, match=r"nonsense|Missing"):
        parse(arguments)


@every_document
def test_every_python_script_that_is_run_exists(document):
    for arguments in shell_lines(document, "python"):
        assert arguments[0].startswith("-") or (ROOT / arguments[0]).is_file(), arguments


@every_document
def test_relative_links_point_to_something(document):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_every_yaml_block_is_a_description_or_a_recipe():
    kinds = set()
    for text in blocks(OWN_DATA, "yaml"):
        values = yaml.safe_load(text)
        kind = load_recipe if "name" in values else TableDescription.model_validate
        kind(values)
        kinds.add(kind)
    assert len(kinds) == 2


def test_the_example_of_own_data_loads_without_a_remark_and_divides(tmp_path):
    table, new = blocks(OWN_DATA, "csv")
    (tmp_path / "table.csv").write_text(table)
    (tmp_path / "dataset.yaml").write_text(blocks(OWN_DATA, "yaml")[0])
    (tmp_path / "photos").mkdir()
    for number, line in enumerate(table.splitlines()[1:]):
        cv2.imwrite(str(tmp_path / "photos" / line.split(",")[0]), np.full((8, 8, 3), 128 + number, np.uint8))
    dataset = load_dataset("csv_table", tmp_path)
    assert not dataset.warnings
    assert len(dataset.with_image) == 13
    split = split_dataset(dataset)
    assert set(split["split"]) == {"train", "val", "test"}
    names = [field.name for field in dataset.schema.fields]
    assert set(new.splitlines()[0].split(",")) <= {"image", *names}


def section(document, heading):
    """Return the commands of the first block of a section."""
    text = document.read_text(encoding="utf-8").partition(f"# {heading}\n")[2]
    code = re.search(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for line in code[1].splitlines()]


def test_the_commands_about_own_tables_run(sample_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALREFNET_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pad_ufes_20").symlink_to(sample_root)
    tables = {"clinic": (sample_root, "nevus", "melanoma")}
    tables["other_clinic"] = (make_synthetic(tmp_path / "other", images=90, seed=4, side=64), "NV", "MEL")
    description = {"image": "img_id", "label": "diagnostic", "patient": "patient_id", "lesion": "lesion"}
    for name, (root, nevus, melanoma) in tables.items():
        table = pd.read_csv(root / "metadata.csv", dtype=str)
        table = table[table["diagnostic"].isin(["NEV", "MEL", "BCC"])]
        table["lesion"] = table["patient_id"] + table["lesion_id"]
        table["diagnostic"] = table["diagnostic"].map({"NEV": nevus, "MEL": melanoma, "BCC": "BCC"})
        (tmp_path / name).mkdir()
        table.to_csv(tmp_path / name / "table.csv", index=False)
        fields = [{"name": "age", "kind": "numeric"}]
        told = {"title": name, "images": str(root / "images"), "metadata": fields, **description}
        (tmp_path / name / "dataset.yaml").write_text(yaml.safe_dump(told))
    split_dataset(load_dataset("csv_table", tmp_path / "clinic"), folds=3).to_csv(tmp_path / "split.csv", index=False)
    recipe = next(text for text in blocks(OWN_DATA, "yaml") if text.startswith("name:"))
    (tmp_path / "own.yaml").write_text(recipe)
    quick = ["model.method=metadata_only", "data.rows=all", "training.epochs=1", "evaluation.bootstrap=20"]
    quick += ["data.folds=3", "image.size=32", "model.weights=none", "modality_dropout={}", "training.device=cpu"]
    protocols = ROOT / "docs" / "protocols.md"
    commands = [["train", "own.yaml", "--out", "runs/our_clinic"]]
    commands += section(OWN_DATA, "Your own split") + section(OWN_DATA, "Some classes, or groups of them")
    commands += section(protocols, "External test set") + section(protocols, "Lesions instead of images")
    assert [command[0] for command in commands] == ["train", "split", "train", "train", "train", "evaluate", "evaluate"]
    for command in commands:
        done = CliRunner().invoke(dualrefnet.cli.app, [*command, *(quick if command[0] == "train" else [])])
        assert done.exit_code == 0, (command, done.output, done.exception)
    classes = {run.name: Run(run).model["classes"] for run in (tmp_path / "runs").iterdir()}
    assert classes["two_classes"] == ["melanoma", "nevus"]
    assert classes["triage"] == ["malignant", "benign"]
    assert json.loads((tmp_path / "runs/our_clinic/external/other_clinic/metrics.json").read_text())["support"] > 20
    assert Run(tmp_path / "runs/our_clinic").metrics["aggregated"]["by"] == "lesion"


def test_the_leaks_in_protocols_are_those_that_are_measured(real_pad, real_isic):
    text = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    for name, root, kinds in (("pad_ufes_20", real_pad, ("patient", "lesion")), ("isic_2019", real_isic, ("lesion",))):
        dataset = load_dataset(name, root)
        shares = leakage(dataset, split_dataset(dataset, "paper"))
        for kind in kinds:
            worst, share = max(shares[kind]["per_class"].items(), key=lambda item: item[1])
            title = dataset.schema.title
            row = f"| {kind}, {title} | {shares[kind]['train']:.1%} | {shares[kind]['train_or_val']:.1%} | {worst} {share:.1%} |"
            assert row in text


def test_the_counts_in_limitations_are_those_of_the_data(real_pad):
    text = (ROOT / "docs" / "limitations.md").read_text(encoding="utf-8")
    table = load_dataset("pad_ufes_20", real_pad).table
    assert f"**{table['fitspatrick'].isin(['5', '6']).sum()} rows**" in text
    assert f"none at all in {table['fitspatrick'].isna().sum()}" in text
    assert f"{len(table):,} smartphone images, {table['patient_id'].nunique():,} patients" in text
    assert f"({(table['grew'] == 'UNK').sum()} and {(table['changed'] == 'UNK').sum()} rows)" in text


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == dualrefnet.__version__
    assert citation["preferred-citation"]["type"] == "article"
    assert f"## [{dualrefnet.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_install_lines_name_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    texts = [path.read_text(encoding="utf-8") for path in (*DOCUMENTS, *ROOT.glob("docs/*.ipynb"))]
    named = {
        name
        for text in texts
        for found in re.findall(r"pip install '[^'\[]*\[([\w,]+)\]'", text)
        for name in found.split(",")
    }
    assert "explain" in named
    assert named <= set(extras)
    for extra in extras:
        assert install_hint(extra).startswith("pip install '")
    assert len((ROOT / "README.md").read_bytes()) <= 8_000


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    file = ROOT / "docs" / "quickstart.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert (tmp_path / "quickstart" / "run" / "report" / "report.html").is_file()
    assert names["bundled"].label == names["prediction"].label


def test_every_benchmark_is_listed():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "benchmarks").glob("*.py") if f"`{path.name}`" not in text]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("store_filling", ["--count", "4", "--rounds", "1"], 4),
        ("loader", ["--count", "8", "--batch-size", "4", "--rounds", "1"], 3),
        ("training_step", ["--batch-size", "2", "--size", "32", "--rounds", "1"], 4),
        ("peak_memory", ["--count", "64", "--batch-size", "2", "--steps", "1"], 4),
        ("superresolution_psnr", ["--count", "3", "--crop", "64"], 2),
        ("near_duplicates", ["--count", "200", "--rounds", "1"], 3),
    ],
)
def test_every_benchmark_runs(script, options, rows, tmp_path):
    # Without weights at hand the networks can't be measured; whether they are must not change what this test expects.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DUALREFNET_WEIGHTS", "DUALREFNET_DATA")
    }
    environment |= {"HF_HUB_OFFLINE": "1"}
    script_file = ROOT / "benchmarks" / f"{script}.py"
    subprocess.run([sys.executable, script_file, *options, "--out", tmp_path], check=True, env=environment)
    (result,) = tmp_path.glob(f"*-torch*-{script}*.csv")
    table = pd.read_csv(result)
    # A machine with native bf16 measures all cases of a step in it too.
    assert len(table) in (rows, rows * (1 + (script == "training_step")))
    assert (table["value"] > 0).all()


@pytest.mark.slow
def test_the_benchmarks_of_serving_run(tiny_run, sample_root, tmp_path):
    bundle, out = tmp_path / "bundle", tmp_path / "results"
    subprocess.run(
        [sys.executable, "-m", "dualrefnet", "export", tiny_run.path, "--out", bundle, "--no-int8"], check=True
    )
    small = ["--width", "256", "--height", "192", "--out", out]
    for script, arguments in (
        ("predictor_latency", [tiny_run.path, bundle, "--rounds", "3", *small]),
        ("service_load", [bundle, "--clients", "2", "--duration", "2", *small]),
        ("start_up", [tiny_run.path, bundle, next((sample_root / "images").iterdir()), "--rounds", "1", "--out", out]),
    ):
        subprocess.run([sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments], check=True)
    latency, load = (pd.read_csv(next(out.glob(f"*-{name}.csv"))) for name in ("predictor_latency", "service_load"))
    assert (latency["p95_ms"] >= latency["p50_ms"]).all()
    assert load["errors"].tolist() == [0]
    assert (load["requests"] > 0).all()
    assert (pd.read_csv(next(out.glob("*-start_up.csv")))["value"] > 0).all()
