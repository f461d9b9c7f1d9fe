"""Random damage to all that people hand over: tables, images, recipes, folders, requests, options.

Whatever it is, the program answers, or says in words what is wrong with it (exit status 0, 1 or 2; HTTP 200 or 4xx),
soon, and every row is in the answer.
"""

import contextlib
import copy
import csv
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
import yaml
from PIL import Image
from starlette.testclient import TestClient

from dualrefnet.cli import app, main
from dualrefnet.deploy.export import export_run
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run
from dualrefnet.service.app import create_app
from dualrefnet.service.settings import ServiceSettings

SECONDS = 20
CELLS = (
    *("", " ", "NA", "n/a", "None", "nan", "UNK", " 61 ", "61,5", "6e1", "1e309", "-1", "99999999999999999999", "0x1F"),
    *("True", "TRUE", "yes", "\u00a0", "\u200b", "\ufeff", "e\u0301", "\u0661", "=1+1", "a\nb", "a\rb", "\0", '"', "'"),
    *("x" * 200_000, "../../etc/passwd", "/", ".", "con", "\U0001f600", "\udcff", "1\t2", ";", "<b>", "${x}"),
)
VALUES = (
    *(None, True, False, -1, 0, 1, 10**9, 10**30, -0.5, 1e308, math.inf, math.nan, "", " ", "x", "0", "1e9", "\0"),
    *(
        [],
        [None],
        [[]],
        {},
        {"": {}},
        {"x": [1e9]},
        ["x"] * 1000,
        "\U0001f600",
        "../..",
        "nan",
        [0, 0, 0],
        "2026-01-01",
    ),
)
TOKENS = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "3",
        "1e9",
        "99999999999999999999",
        "nan",
        "x",
        "--",
        "-",
        "=",
        "a=b",
        "data.root=",
        "\n",
    ),
    *(
        "sample",
        "csv_table",
        "pad_ufes_20",
        "data",
        "run",
        "run/model.json",
        "data/metadata.csv",
        "new",
        "new/deep/x.csv",
    ),
    *(".", "..", "/dev/null", "/proc/self/mem", "\U0001f600", "cpu", "cuda:9", "meta", "int8", "x" * 5000, "grouped"),
)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F")
KINDS_OF_IMAGE = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM")


class Late(BaseException):
    """It has taken too long; not an Exception, so that nothing catches it."""


@dataclass
class Material:
    """What is handed over undamaged, and a folder for what is damaged."""

    recipe: Recipe
    run: Run
    data: Path
    place: Path

    @cached_property
    def bundle(self) -> Path:
        export_run(self.run, self.place / "bundle", int8=False, accept_missingness_shortcut=True)
        return self.place / "bundle"

    @cached_property
    def client(self) -> TestClient:
        settings = ServiceSettings(accept_missingness_shortcut=True)
        return TestClient(create_app(Predictor.load(self.run), settings), raise_server_exceptions=True)

    @cached_property
    def images(self) -> list[Path]:
        return sorted((self.data / "images").iterdir())


def call(*arguments: object) -> tuple[int, str]:
    """Run the command line in this process, and return its exit status and what it printed."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["dualrefnet", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    assert status in (0, 1, 2), f"exit status {status}: {printed.getvalue()}"
    assert "Traceback" not in printed.getvalue(), printed.getvalue()
    assert status == 0 or printed.getvalue().strip(), "it stopped without a word"
    return status, printed.getvalue()


def damage_bytes(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content) + 1)
    noise = draw.randbytes(draw.choice((1, 2, 50, 5000)))
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 3, 100)) if content else 0):
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    choices = (
        content[:place],
        content[place:],
        content[:place] + noise + content[place:],
        content + noise,
        content * 2,
    )
    return draw.choice(
        (*choices, bytes(flipped), bytes(flipped), b"", noise, content[:place] + bytes(len(content) - place))
    )


def damage_value(draw: random.Random, value: Any) -> Any:
    """Change, remove or add something anywhere in nested lists and mappings."""
    value = copy.deepcopy(value)
    node = value
    for _ in range(20):
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not keys:
            return draw.choice(VALUES)
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        match draw.randrange(6):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[draw.choice(("", "x", "__class__", str(key).upper(), f"{key} "))] = node[key]
            case 2:
                for _ in range(draw.choice((1, 3, 200))):
                    node[key] = [node[key]]
            case _:
                node[key] = draw.choice(VALUES)
        break
    return value


def damage_rows(draw: random.Random, rows: list[list[str]]) -> list[list[str]]:
    """Change cells, names of columns and lengths of rows; there are as many rows as before."""
    rows = [list(row) for row in rows]
    for _ in range(draw.choice((1, 1, 2, 5))):
        line = draw.randrange(len(rows)) if draw.random() < 0.8 else 0
        if not rows[line]:
            continue
        column = draw.randrange(len(rows[line]))
        match draw.randrange(9):
            case 0:
                for row in rows:
                    del row[column : column + 1]
            case 1:
                for row in rows:
                    row.insert(0, row[column] if column < len(row) else "")
            case 2 if line:
                rows[line] = rows[line][:column] or [""]
            case 3 if line:
                rows[line] += draw.choices(CELLS, k=draw.choice((1, 3)))
            case 4:
                rows[line][column] = draw.choice((str.upper, str.lower, str.title))(rows[line][column])
            case 5:
                rows[line][column] = f" {rows[line][column]}\t"
            case 6 if line:
                rows[line][column] = rows[draw.randrange(1, len(rows))][0]
            case _:
                rows[line][column] = draw.choice(CELLS)
    return rows


def write_rows(draw: random.Random, path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    ends = draw.choice(("\n", "\r\n", "\n", "\n"))
    # The writer quotes a carriage return only if it is part of the line's end.
    ends = "\r\n" if any("\r" in cell for row in rows for cell in row) else ends
    csv.writer(text, delimiter=draw.choice((*",,,,,", ";", "\t")), lineterminator=ends).writerows(rows)
    encoding = draw.choice((*["utf-8"] * 5, "utf-8-sig", "utf-16", "latin-1", "cp1252"))
    path.write_bytes(text.getvalue().encode(encoding, errors="replace" if encoding != "utf-8" else "surrogateescape"))


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def damage_file(draw: random.Random, path: Path, others: Sequence[Path]) -> None:
    """Damage a file as its kind can be, or as any file can be."""
    content = path.read_bytes()
    # What a link shares with the original must not be written through it.
    path.unlink()
    structured = draw.random() < 0.6
    if structured and path.suffix == ".json":
        path.write_text(json.dumps(damage_value(draw, json.loads(content))))
    elif structured and path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(damage_value(draw, yaml.safe_load(content))))
    elif structured and path.suffix == ".csv":
        write_rows(draw, path, damage_rows(draw, list(csv.reader(io.StringIO(content.decode())))))
    elif (chance := draw.randrange(5)) == 0:
        path.write_bytes(draw.choice(others).read_bytes())
    elif chance == 1:
        path.mkdir()
    elif chance < 4:
        path.write_bytes(damage_bytes(draw, content))


def assert_rows(out: Path, count: int) -> None:
    """Every row is predicted, or its error says why not."""
    if not out.exists():
        return
    table = pd.read_csv(out, dtype=str, keep_default_na=False)
    assert len(table) == count, f"{len(table)} of {count} rows"
    assert ((table["predicted"] != "") | (table["error"] != "")).all(), table


def fuzz_table(draw: random.Random, given: Material, folder: Path) -> None:
    rows = read_rows(given.data / "metadata.csv")
    where = rows[0].index("img_id")
    rows[0][where] = "image"
    for row, image in zip(rows[1:], given.images, strict=True):
        row[where] = str(image)
    rows = rows[: draw.choice((1, 2, 5))]
    raw = draw.random() < 0.25
    write_rows(draw, folder / "table.csv", rows if raw else damage_rows(draw, rows))
    if raw:
        (folder / "table.csv").write_bytes(damage_bytes(draw, (folder / "table.csv").read_bytes()))
    status, printed = call("predict", given.run.path, "--csv", folder / "table.csv", "--out", folder / "out.csv")
    if not raw:
        assert_rows(folder / "out.csv", len(rows) - 1)
    assert status != 0 or (folder / "out.csv").exists(), printed


def fuzz_dataset(draw: random.Random, given: Material, folder: Path) -> None:
    for path in given.data.iterdir():
        (folder / path.name).symlink_to(path) if path.is_dir() else shutil.copy(path, folder)
    damage_file(draw, folder / "metadata.csv", given.images)
    commands: list[tuple[object, ...]] = [
        ("check", "sample"),
        ("split", "sample", "--out", folder / "split.csv"),
        ("audit", "sample", "--without-images", "--without-forests", "--out", folder / "audit.json"),
    ]
    call(*draw.choice(commands), "--root", folder)


def fuzz_image(draw: random.Random, given: Material, folder: Path) -> None:
    files = list(draw.sample(given.images, 2))
    stream = io.BytesIO()
    with Image.open(files[0]) as image, contextlib.suppress(ValueError, OSError):
        exif = Image.Exif()
        exif[0x0112] = draw.choice((1, 3, 6, 8, 99))
        mode = draw.choice(MODES)
        image = image.convert("RGB" if mode == "I;16" else mode)
        image = image.convert("I").convert("I;16") if mode == "I;16" else image
        image = image.resize(draw.choice(((64, 64), (1, 1), (3000, 2), (65, 33))))
        image.save(stream, draw.choice(KINDS_OF_IMAGE), exif=exif)
    content = stream.getvalue() or files[0].read_bytes()
    files[0] = folder / f"case{draw.choice(('.png', '.jpg', '.tif', '.webp', '.bmp', '', '.PNG', '.txt'))}"
    files[0].write_bytes(content if draw.random() < 0.4 else damage_bytes(draw, content))
    arguments = [part for file in files for part in ("--images", file)]
    call("predict", given.run.path, *arguments, "--out", folder / "out.csv")
    assert_rows(folder / "out.csv", 2)


def fuzz_recipe(draw: random.Random, given: Material, folder: Path) -> None:
    recipe = given.recipe.model_dump(mode="json") | {"name": "fuzz"}
    recipe["data"]["root"] = str(given.data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        recipe = damage_value(draw, recipe)
    content = yaml.safe_dump(recipe).encode()
    (folder / "recipe.yaml").write_bytes(content if draw.random() < 0.8 else damage_bytes(draw, content))
    override = [f"{draw.choice(('image.size', 'data', 'x.y', 'training.seed'))}={draw.choice(TOKENS)}"]
    call("prepare", folder / "recipe.yaml", *override * (draw.random() < 0.3), "--cache", folder / "cache")


def link_folder(source: Path, target: Path) -> list[Path]:
    """Make a folder of links, for files are large; return its files."""
    shutil.copytree(source, target, copy_function=os.link)
    return sorted(path for path in target.rglob("*") if path.is_file())


def fuzz_run(draw: random.Random, given: Material, folder: Path) -> None:
    files = link_folder(given.run.path, folder / "run")
    damage_file(draw, draw.choice(files), given.images + [file for file in files if file.stat().st_size < 10**6])
    if draw.random() < 0.2:
        call("evaluate", folder / "run")
    else:
        call("predict", folder / "run", "--images", given.images[0], "--out", folder / "out.csv")
        assert_rows(folder / "out.csv", 1)


def fuzz_bundle(draw: random.Random, given: Material, folder: Path) -> None:
    files = link_folder(given.bundle, folder / "bundle")
    damage_file(draw, draw.choice(files), given.images)
    call("predict", folder / "bundle", "--images", given.images[0], "--out", folder / "out.csv")
    assert_rows(folder / "out.csv", 1)


def fuzz_request(draw: random.Random, given: Material, folder: Path) -> None:
    metadata: Any = {"age": 61, "region": "FACE", "itch": True, "smoke": None}
    for _ in range(draw.choice((0, 1, 1, 2))):
        metadata = damage_value(draw, metadata)
    text = json.dumps(metadata).encode()
    text = text if draw.random() < 0.7 else damage_bytes(draw, text)
    image = given.images[0].read_bytes()
    image = image if draw.random() < 0.6 else damage_bytes(draw, image)
    route = draw.choice(("/v1/predict", "/v1/explain", "/v1/predict?x=1", "/v1/model", "/v1/%00"))
    headers = {
        "content-type": draw.choice(
            ("application/json", "multipart/form-data", "text/csv", "multipart/form-data; boundary=")
        )
    }
    if draw.random() < 0.8:
        name = draw.choice(("images", "images", "images", "image", "metadata", ""))
        files = [(name, ("x.png", image))] * draw.choice((1, 1, 2, 20))
        response = given.client.post(route, files=files, data={"metadata": text.decode("latin-1")})
    else:
        response = given.client.post(route, content=text, headers=headers)
    assert response.status_code == 200 or 400 <= response.status_code < 500, (response.status_code, response.text)
    assert response.json()


def fuzz_options(draw: random.Random, given: Material, folder: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = draw.choice(
        ("check", "split", "audit", "prepare", "evaluate", "predict", "recipes", "suites", "tables", "probe")
    )
    flags = [flag for one in commands[name].params for flag in one.opts if flag.startswith("--") and flag != "--ray"]
    arguments = draw.choices(TOKENS, k=draw.choice((0, 1, 1, 2)))
    for flag in draw.sample(flags, min(len(flags), draw.choice((0, 1, 2, 3)))):
        arguments += [flag, draw.choice(TOKENS)] if draw.random() < 0.9 else [flag]
    link_folder(given.run.path, folder / "run")
    (folder / "data").symlink_to(given.data)
    call(name, *arguments)


FUZZERS: tuple[Callable[[random.Random, Material, Path], None], ...] = (
    *(fuzz_table, fuzz_dataset, fuzz_image, fuzz_recipe, fuzz_run, fuzz_request, fuzz_options, fuzz_bundle),
)


@pytest.fixture(scope="module")
def material(
    tiny_recipe: Recipe, tiny_run: Run, sample_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Material:
    return Material(tiny_recipe, tiny_run, sample_root, tmp_path_factory.mktemp("fuzz"))


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Stop what computes for longer; what only waits is stopped by the limit of every test."""

    def stop(*_: object) -> None:
        raise Late(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def assert_survived(given: Material, fuzz: Callable[..., None], tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes wrong; else show the first fault of each place in the source, with the try that found it."""
    faults: dict[str, str] = {}
    for number in range(tries):
        folder = given.place / f"{fuzz.__name__}{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            with limited(SECONDS):
                fuzz(random.Random(number), given, folder)
        except (Exception, Late) as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "dualrefnet" in frame.filename] or frames
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}, {type(error).__name__}"
            faults.setdefault(place, f"try {number}: {str(error)[:300]}")
        monkeypatch.chdir(given.place)
        shutil.rmtree(folder)
    assert not faults, "\n".join(f"{place}, {words}" for place, words in faults.items())


@pytest.mark.parametrize("fuzz", [fuzz for fuzz in FUZZERS if fuzz is not fuzz_bundle], ids=lambda fuzz: fuzz.__name__)
def test_a_little_damage_is_survived(
    material: Material, fuzz: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_survived(material, fuzz, 9, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", FUZZERS, ids=lambda fuzz: fuzz.__name__)
def test_much_damage_is_survived(
    material: Material, fuzz: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What takes time once: an export, and the first request.
    assert fuzz is not fuzz_bundle or material.bundle.is_dir()
    assert_survived(material, fuzz, 250, monkeypatch)
