import configparser
import importlib
import json
import pkgutil
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
import typer
import yaml

import dualrefnet.cli
from live_service import live, question, wait_for

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
UNIT = ROOT / "deployment" / "dualrefnet.service"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Return what the Dockerfile says, one pair an instruction."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], " ".join(line.split(" ", 1)[1].split())) for line in text.splitlines()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of every stage; the last one, which has no name, under `final`."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            stage = rest.split(" AS ")[1] if " AS " in rest else "final"
            found[stage] = []
        if found:
            found[stage].append((name, rest))
    return found


def of(kind: str, stage: str = "final") -> list[str]:
    return [rest for name, rest in stages()[stage] if name == kind]


def parse(arguments: list[str], model: Path) -> None:
    """Parse a command as the program would, with a model that is there, without running it."""
    for module in pkgutil.iter_modules(dualrefnet.cli.__path__):
        importlib.import_module(f"dualrefnet.cli.{module.name}")
    group = typer.main.get_command(dualrefnet.cli.app)
    command = group.get_command(typer.Context(group), arguments[0])
    assert command is not None, arguments[0]
    assert arguments[1].startswith("/")
    command.make_context(arguments[0], [str(model), *arguments[2:]])


def packages_of_the_cpu_image() -> list[str]:
    (line,) = [line for line in of("RUN", "cpu") if "numpy" in line]
    return [word for word in line.split("requirements.lock")[1].split() if word != "\\"]


def test_images_are_plain_names_and_nothing_names_a_registry() -> None:
    for rest in (rest for name, rest in instructions() if name == "FROM"):
        assert rest.split(" AS ")[0] in ("python:3.11-slim", "${FLAVOUR}")
    assert set(stages()) == {"wheel", "cpu", "gpu", "packages", "final"}
    for file in (DOCKERFILE, ROOT / "compose.yaml", UNIT):
        for host in re.findall(r"\w+://([\w.-]+)", file.read_text()):
            assert host == "127.0.0.1"
        assert not re.search(r"(--index-url|--extra-index-url|-i |--find-links)", file.read_text())


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    # What hatchling needs to build the package, and no ADD, which would unpack or fetch.
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= copied
    assert "ADD" not in {name for name, _ in instructions()}


def test_the_commands_of_image_compose_and_unit_exist_with_their_options(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").touch()
    assert of("ENTRYPOINT") == ['["dualrefnet"]']
    parse(json.loads(of("CMD")[0]), tmp_path)
    parse(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["dualrefnet"]["command"], tmp_path)
    unit = read_unit()["Service"]
    parse(shlex.split(unit["ExecStart"])[1:], tmp_path)


def test_the_packages_of_the_cpu_image_are_known_and_locked_and_hold_no_torch() -> None:
    named = {
        re.split(r"[\[<>=~]", line)[0].lower()
        for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["deploy"]]
    }
    lock = (ROOT / "requirements.lock").read_text()
    packages = packages_of_the_cpu_image()
    assert {"numpy", "onnxruntime", "fastapi"} <= set(packages)
    for package in packages:
        assert package.lower() in named
        assert re.search(rf"^{package}==", lock, re.MULTILINE | re.IGNORECASE), package
    assert not {"torch", "torchvision", "timm"} & set(packages)
    # The service's own libraries are all there.
    assert {re.split(r"[\[<>=~]", line)[0] for line in PROJECT["optional-dependencies"]["deploy"]} <= set(packages)


def test_the_packages_of_the_cpu_image_are_enough_to_predict_and_to_serve() -> None:
    code = """
import importlib.metadata as metadata, re, sys
def name(text): return re.match(r"[\\w.-]+", text)[0].lower().replace("_", "-").replace(".", "-")
allowed, waiting = {"dualrefnet"}, [name(word) for word in sys.argv[1:]]
from packaging.requirements import Requirement
while waiting:
    package = waiting.pop()
    if package in allowed: continue
    allowed.add(package)
    for line in metadata.requires(package) or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}): waiting.append(name(needed.name))
owners = metadata.packages_distributions()
from importlib.machinery import PathFinder
class Image(PathFinder):
    @classmethod
    def find_spec(cls, module, path=None, target=None):
        owner = {name(one) for one in owners.get(module.split(".")[0], [])}
        return None if owner and not owner & allowed else super().find_spec(module, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Image
import dualrefnet.cli.data, dualrefnet.cli.runs, dualrefnet.cli.reports
import dualrefnet.deploy.batch, dualrefnet.deploy.predictor
import dualrefnet.service.server, dualrefnet.service.app, dualrefnet.runtime.bundle
try:
    import torch
except ImportError:
    print("no torch")
"""
    command = [sys.executable, "-c", code, *packages_of_the_cpu_image()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "no torch"


def read_unit() -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read_string(UNIT.read_text())
    return unit


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_accepts_the_example_and_cuts_off_slow_headers(tmp_path: Path) -> None:
    with live() as client, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        site = (ROOT / "deployment" / "nginx.conf").read_text()
        for old, new in (
            ("listen 443 ssl", f"listen 127.0.0.1:{port}"),
            ("127.0.0.1:8000", client.base_url.netloc.decode()),
            ("client_header_timeout 10s", "client_header_timeout 1s"),
        ):
            assert old in site
            site = site.replace(old, new)
        site = "\n".join(line for line in site.splitlines() if "ssl_" not in line)
        folders = " ".join(
            f"{kind}_temp_path {tmp_path / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/pid; error_log stderr; events {{}} http {{ {folders}\n{site}\n}}"
        )
        command = ["nginx", "-c", str(tmp_path / "nginx.conf")]
        subprocess.run([*command, "-t"], check=True, capture_output=True)
        proxy = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            base = f"http://127.0.0.1:{port}"
            wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            assert httpx.post(f"{base}/v1/predict", **question()).status_code == 200
            started = time.perf_counter()
            with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
                slow.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
                assert not slow.recv(65536) or time.perf_counter() - started > 0.5
            assert time.perf_counter() - started < 8
        finally:
            proxy.terminate()
            proxy.wait(10)
