"""Bundles on the Hugging Face Hub: `from_pretrained`, `save_pretrained`, `push_to_hub`.

Only a bundle's own files are sent or fetched. Nothing of a fetched bundle is run: its folder `runtime/`, which is for
people, isn't fetched, and its networks are read only if they are the ones that `bundle.json` describes.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from dualrefnet.errors import RunError
from dualrefnet.files import sha256_of_file, write_text
from dualrefnet.runtime.bundle import DESCRIPTION, NETWORKS, SCORE, SUMS, one_line, read_description, read_sums

FILES = (DESCRIPTION, *NETWORKS, "model.pt2", SCORE, "form.schema.json", "README.md", "DATA_LICENCE.md", SUMS)
RUNTIME = "runtime"
# What the client raises if the Hub refuses or isn't reached: in the latter case its library's errors, which differ
# between versions.
_REFUSALS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)


class BundleMixin(ModelHubMixin, ABC, library_name="dualrefnet", tags=["dualrefnet"]):
    """The Hub's standard methods for a class that is loaded from the folder `bundle`; None: it is of no bundle."""

    bundle: Path | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # The mixin would write the arguments into a `config.json` beside the bundle's files.
        made = super().__new__(cls)
        made._hub_mixin_config = None
        return made

    @classmethod
    @abstractmethod
    def load(cls, *args: Any, **options: Any) -> Self:
        """Load a bundle's folder, the first argument, with options of the class, such as `device` and `variant`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a bundle from the Hub or from a folder.

        Unlike the mixin's own method this one reads no `config.json`, whose values would become arguments of the class.

        Args:
            pretrained_model_name_or_path: `ORG/NAME`, or a folder.
            force_download: also what is in the cache already.
            token: of the Hub; None: the one that the user has logged in with.
            cache_dir: where fetched files lie.
            local_files_only: never use the network.
            revision: branch, tag or commit; None: the newest commit of the main branch.
            options: of `load`, such as `device` and `variant`.

        Raises:
            RunError: there is no such bundle, it can't be fetched, or its files aren't those that it describes.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            fetching = {"force_download": force_download, "local_files_only": local_files_only, "revision": revision}
            folder = _fetch(str(folder), token=token, cache_dir=cache_dir, **fetching)
        check_bundle(folder)
        loaded = cls.load(folder, **options)
        loaded.bundle = folder
        return loaded

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.bundle is None:
            raise RunError(
                "a run folder can't be saved or pushed: make a bundle with `dualrefnet export RUN --out DIR`"
            )
        copy_bundle(self.bundle, save_directory)


class _Folder(BundleMixin):
    """A bundle that is pushed without a network being loaded."""

    @classmethod
    def load(cls, *args: Any, **options: Any) -> Self:
        return cls()


def push_bundle(folder: Path, repository: str, **options: Any) -> str:
    """Push a bundle to the repository `ORG/NAME` of the Hub, with options of `push_to_hub`; return the commit's URL."""
    bundle = _Folder.from_pretrained(folder)
    try:
        return str(bundle.push_to_hub(repository, commit_message="Upload a bundle of dualrefnet", **options))
    except HFValidationError as error:
        raise RunError(f"{repository!r} is no name of a repository, which is ORG/NAME: {one_line(error)}") from None
    except _REFUSALS as error:
        raise RunError(
            f"{folder} couldn't be pushed to {repository}: {one_line(error)}; is it reachable, and are you logged "
            "in (`hf auth login`)?"
        ) from None


def is_bundle(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def check_bundle(folder: Path) -> dict[str, Any]:
    """Return the content of `bundle.json`, after a check of the bundle's files; see `read_description`."""
    if not is_bundle(folder):
        raise RunError(f"{folder} is no bundle: it has no {DESCRIPTION}; `dualrefnet export RUN --out DIR` makes one")
    try:
        return read_description(folder)
    except (ValueError, OSError) as error:
        raise RunError(one_line(error)) from None


def copy_bundle(source: Path, target: Path) -> None:
    """Copy a bundle's own files, and no others beside them; a fetched one gets the `runtime/` of this version."""
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    copy_runtime(target, source / RUNTIME if (source / RUNTIME).is_dir() else None)
    write_sums(target)


def write_sums(folder: Path) -> None:
    """List a bundle's own files with their SHA-256, for `sha256sum --check`."""
    own = [*(folder / name for name in FILES if name != SUMS), *sorted((folder / RUNTIME).glob("*.py"))]
    lines = [f"{sha256_of_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in own if file.is_file()]
    write_text(folder / SUMS, "".join(lines))


def copy_runtime(target: Path, source: Path | None = None) -> None:
    """Copy the package `dualrefnet.runtime`, or that of another bundle, so that a bundle needs no dualrefnet."""
    source = source or Path(str(resources.files("dualrefnet"))) / RUNTIME
    if not (source / "__main__.py").is_file():
        raise RunError(f"{source} is incomplete; install dualrefnet, or fetch the bundle, again")
    (target / RUNTIME).mkdir(exist_ok=True)
    for module in sorted(source.glob("*.py")):
        # Not copy2: the content of a bundle must not depend on when the source was checked out.
        shutil.copyfile(module, target / RUNTIME / module.name)


def _fetch(model_id: str, **options: Any) -> Path:
    """Fetch a bundle's files, and no others of the repository."""
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=list(FILES), library_name="dualrefnet", **options))
        # Where the Hub can't be reached, the client gives what an interrupted download has left.
        missing = [name for name in read_sums(folder) if name in FILES and not (folder / name).is_file()]
        if missing:
            raise RunError(f"{model_id} was fetched incompletely: {', '.join(missing)} is missing; fetch it again")
        return folder
    except HFValidationError:
        reason = "it is no name on the Hub, which is ORG/NAME"
    except RepositoryNotFoundError:
        reason = "no such repository on the Hub that you may see; `hf auth login` logs in"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "the Hub can't be reached to fetch it; it isn't in the cache either"
    except _REFUSALS as error:
        raise RunError(f"{model_id} couldn't be fetched: {one_line(error)}") from None
    raise RunError(f"there is no folder {model_id}, and {reason}")
