import shutil
import socket
from pathlib import Path
from typing import Any, Self

import pytest
from huggingface_hub import HfApi, hub_mixin
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from bundle_folder import write_bundle
from dualrefnet.deploy import hub
from dualrefnet.deploy.hub import FILES, BundleMixin, push_bundle
from dualrefnet.errors import RunError


class Loaded(BundleMixin):
    """What stands for the predictor."""

    def __init__(self, folder: Path, device: str = "cpu", variant: str = "float32") -> None:
        self.folder, self.device, self.variant = folder, device, variant

    @classmethod
    def load(cls, folder: Path, **options: Any) -> Self:
        return cls(folder, **options)


class Server:
    """Stands for the Hub: a folder for each repository and revision."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def folder(self, repo_id: str, revision: str | None) -> Path:
        return self.root / repo_id / (revision or "main")

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return type("Address", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, **options: Any) -> str:
        self.calls.append(("upload_folder", {"repo_id": repo_id, "revision": revision, **options}))
        shutil.copytree(folder_path, self.folder(repo_id, revision), dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(
        self, repo_id: str, *, allow_patterns: list[str], revision: str | None, **options: Any
    ) -> str:
        self.calls.append(("snapshot_download", {"repo_id": repo_id, "revision": revision, **options}))
        source, target = self.folder(repo_id, revision), self.root / "cache" / repo_id / (revision or "main")
        if not source.is_dir():
            raise LocalEntryNotFoundError("cannot find it")
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        return str(target)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle, and files beside its own."""
    folder = write_bundle(tmp_path / "bundle")
    (folder / "patients.csv").write_text("name\n")
    (folder / "runtime" / "__pycache__").mkdir()
    (folder / "runtime" / "__pycache__" / "metadata.pyc").write_bytes(b"compiled")
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server(tmp_path / "hub")
    monkeypatch.setattr(hub_mixin, "HfApi", lambda **_: made)
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def own(folder: Path) -> set[str]:
    return {name for name in names(folder) if name in FILES or (name.startswith("runtime/") and name.endswith(".py"))}


def test_a_folder_is_loaded_and_saved_with_its_own_files_alone(bundle: Path, tmp_path: Path) -> None:
    loaded = Loaded.from_pretrained(bundle, device="cuda", variant="int8")
    assert (loaded.folder, loaded.bundle) == (bundle, bundle)
    assert (loaded.device, loaded.variant) == ("cuda", "int8")
    loaded.save_pretrained(tmp_path / "copy")
    assert names(tmp_path / "copy") == own(bundle)
    loaded.save_pretrained(bundle)
    assert "patients.csv" in names(bundle), "a bundle saved where it lies stays as it is"


def test_a_bundle_goes_to_the_hub_and_comes_back(bundle: Path, server: Server, tmp_path: Path) -> None:
    address = Loaded.from_pretrained(bundle).push_to_hub("org/name", private=True, branch="v1")
    assert address == "https://hub/org/name/commit/1"
    assert [name for name, _ in server.calls] == ["create_repo", "upload_folder"]
    assert server.calls[0][1]["private"] is True
    sent = server.folder("org/name", "v1")
    assert names(sent) == own(bundle)
    # Somebody adds what isn't a bundle's own.
    (sent / "evil.py").write_text("raise SystemExit")
    (sent / "config.json").write_text('{"variant": "int8", "device": "elsewhere"}')
    (sent / "runtime" / "metadata.py").write_text("raise SystemExit")
    back = Loaded.from_pretrained("org/name", revision="v1")
    assert server.calls[-1][1]["revision"] == "v1"
    assert names(back.folder) == {name for name in own(bundle) if name in FILES}
    assert (back.device, back.variant) == ("cpu", "float32"), (
        "values of a foreign config.json must not become arguments"
    )
    back.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == own(bundle)
    assert (tmp_path / "again" / "runtime" / "metadata.py").read_text() == (
        bundle / "runtime" / "metadata.py"
    ).read_text()


def test_a_download_that_is_incomplete_or_no_bundle_is_not_used(bundle: Path, server: Server) -> None:
    push_bundle(bundle, "org/name")
    (server.folder("org/name", None) / "README.md").unlink()
    with pytest.raises(RunError, match=r"incompletely: README\.md"):
        Loaded.from_pretrained("org/name")
    (bundle / "model.int8.onnx").unlink()
    with pytest.raises(RunError, match=r"no model\.int8\.onnx"):
        Loaded.from_pretrained(bundle)
    (bundle / "bundle.json").unlink()
    with pytest.raises(RunError, match="is no bundle"):
        Loaded.from_pretrained(bundle)


def test_a_refusal_of_the_hub_is_one_line(bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="ORG/NAME"):
        push_bundle(bundle, "not/a/name")
    with monkeypatch.context() as patch:
        patch.setattr(hub_mixin, "HfApi", HfApi)
        with pytest.raises(RunError, match="is it reachable"):
            push_bundle(bundle, "org/name", token="hf_x")

    def refuse(**_: Any) -> str:
        raise OSError("401 Client Error\nUnauthorized")

    monkeypatch.setattr(server, "upload_folder", refuse)
    with pytest.raises(RunError, match=r"401 Client Error Unauthorized.*hf auth login"):
        push_bundle(bundle, "org/name")
