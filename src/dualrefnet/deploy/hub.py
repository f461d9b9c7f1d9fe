"""Bundles on the Hugging Face Hub, or on a server that speaks its language: `from_pretrained`, `save_pretrained`,
`push_to_hub`.

Only a bundle's own files are sent or fetched. Of a bundle that was fetched nothing is run: its folder `runtime/`, which
is for people,
stays where it is, and its networks are read only if they are the ones that `bundle.json` describes.
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
from dualrefnet.files import read_json, sha256_of_file

DESCRIPTION = "bundle.json"
NETWORKS = ("model.onnx", "model.int8.onnx")
FILES = (
    DESCRIPTION,
    *NETWORKS,
    "model.pt2",
    "out_of_scope.safetensors",
    "form.schema.json",
    "README.md",
    "DATA_LICENCE.md",
)
RUNTIME = "runtime"
MESSAGE = "Upload a bundle of dualrefnet"
# What the Hub answers, and what its client raises where nobody answers: the library of the latter isn't the same in all
# versions.
_REFUSALS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)


class BundleMixin(ModelHubMixin, ABC, library_name="dualrefnet", tags=["dualrefnet"]):
    """Standard methods of the Hub for a class that is loaded from a bundle's folder.

    Attributes:
        bundle: the folder that it was loaded from; None if that was no bundle.
    """

    bundle: Path | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an object whose arguments aren't kept: the mixin would write them into a `config.json` beside the
        bundle's files.
        """
        made = super().__new__(cls)
        made._hub_mixin_config = None
        return made

    @classmethod
    @abstractmethod
    def load(cls, *args: Any, **options: Any) -> Self:
        """Load a bundle's folder, the first argument.

        Args:
            args: the folder, with `bundle.json`.
            options: of the class, such as `device` and `variant`.
        """

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

        Unlike the mixin's own method this one asks the Hub for no `config.json`, whose values would become arguments of
        the class.

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
        return cls._from_pretrained(
            model_id=str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            **options,
        )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **options: Any,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = _fetch(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        check_bundle(folder)
        loaded = cls.load(folder, **options)
        loaded.bundle = folder
        return loaded

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.bundle is None:
            raise RunError(
                "a run folder can't be saved or sent as a bundle: make one with `dualrefnet export RUN --out DIR`"
            )
        copy_bundle(self.bundle, save_directory)


class _Folder(BundleMixin):
    """A bundle that is only carried from one place to another."""

    @classmethod
    def load(cls, *args: Any, **options: Any) -> Self:
        """Take the folder as it is."""
        return cls()


def push_bundle(folder: Path, repository: str, **options: Any) -> str:
    """Send a bundle to the Hub.

    Args:
        folder: of the bundle.
        repository: `ORG/NAME`.
        options: of `ModelHubMixin.push_to_hub`, such as `private`, `branch` and `token`.

    Returns:
        The address of the commit.

    Raises:
        RunError: it is no bundle, the name isn't one, or the Hub refuses it.
    """
    try:
        return str(_Folder.from_pretrained(folder).push_to_hub(repository, commit_message=MESSAGE, **options))
    except HFValidationError as error:
        raise RunError(f"{repository!r} is no name of a repository, which is ORG/NAME: {_one_line(error)}") from None
    except _REFUSALS as error:
        raise RunError(
            f"{folder} couldn't be sent to {repository}: {_one_line(error)}; is the network there, and are you logged in (`hf auth login`)?"
        ) from None


def is_bundle(folder: Path) -> bool:
    """Return whether a folder is a bundle."""
    return (folder / DESCRIPTION).is_file()


def check_bundle(folder: Path) -> None:
    """Check that a bundle's networks are the ones that it describes.

    Raises:
        RunError: it is no bundle, a network is missing, has another name than networks have, or another content.
    """
    if not is_bundle(folder):
        raise RunError(f"{folder} is no bundle: it has no {DESCRIPTION}; `dualrefnet export RUN --out DIR` makes one")
    try:
        networks = {
            name: (str(one["file"]), str(one["sha256"]))
            for name, one in read_json(folder / DESCRIPTION)["networks"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder / DESCRIPTION} is damaged: {_one_line(error)}; fetch or export the bundle again"
        ) from None
    for variant, (name, digest) in networks.items():
        if name not in NETWORKS:
            raise RunError(
                f"{folder / DESCRIPTION} names {name[:60]!r} as network {variant}; networks are called {' or '.join(NETWORKS)}"
            )
        if not (folder / name).is_file():
            raise RunError(
                f"{folder} has no {name}, which its {DESCRIPTION} describes; fetch or export the bundle again"
            )
        if sha256_of_file(folder / name) != digest:
            raise RunError(
                f"{folder / name} isn't the file that {DESCRIPTION} describes (SHA-256); fetch or export the bundle again"
            )


def copy_bundle(source: Path, target: Path) -> None:
    """Copy a bundle's own files, and nothing else that lies in its folder.

    A bundle that was fetched has no `runtime/`; its copy gets that of this version.
    """
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / RUNTIME).is_dir():
        _copy_modules(sorted((source / RUNTIME).glob("*.py")), target / RUNTIME)
    else:
        copy_runtime(target)


def copy_runtime(target: Path) -> None:
    """Copy the package `dualrefnet.runtime` into a bundle, so that the bundle can be used without dualrefnet.

    Raises:
        RunError: this installation lacks it.
    """
    modules = sorted(Path(str(resources.files("dualrefnet"))).joinpath(RUNTIME).glob("*.py"))
    if not any(module.name == "__main__.py" for module in modules):
        raise RunError("this installation of dualrefnet has no folder runtime/; install dualrefnet again")
    _copy_modules(modules, target / RUNTIME)


def _copy_modules(modules: list[Path], target: Path) -> None:
    target.mkdir(exist_ok=True)
    for module in modules:
        # Not copy2: what a bundle holds shall not depend on when the source was checked out.
        shutil.copyfile(module, target / module.name)


def _fetch(model_id: str, **options: Any) -> Path:
    """Fetch a bundle's files; all others of the repository stay where they are."""
    try:
        return Path(snapshot_download(model_id, allow_patterns=list(FILES), library_name="dualrefnet", **options))
    except HFValidationError:
        raise RunError(f"there is no folder {model_id}, and it is no name on the Hub, which is ORG/NAME") from None
    except RepositoryNotFoundError:
        raise RunError(
            f"there is no folder {model_id}, and no such repository on the Hub that you may see; `hf auth login` logs in"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise RunError(
            f"there is no folder {model_id}, and the Hub can't be reached to fetch it; it isn't in the cache either"
        ) from None
    except _REFUSALS as error:
        raise RunError(f"{model_id} couldn't be fetched: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
