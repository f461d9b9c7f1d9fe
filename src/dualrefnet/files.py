"""Reading and atomic writing of the formats of state on disk: JSON, CSV, YAML and safetensors.

A reader sees the old file or the new one, never half of one: every write goes to a neighbour and is then renamed.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from dualrefnet.errors import DataError, RecipeError, RunError

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pandas as pd

# Read once, at import: the umask can only be read by setting it, and another thread must not write a file meanwhile.
_UMASK = os.umask(0)
os.umask(_UMASK)

# Ends the name of what is being written.
PARTIAL = ".dualrefnet.partial"
_swept: set[Path] = set()

FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Characters of a YAML file at most.
YAML_LIMIT = 1_000_000


@contextmanager
def enough_space(path: Path | str) -> Iterator[None]:
    """Say in one line that `path` wasn't written because the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise not_written(path, error) from error


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary neighbour of `path`, a regular file at most, and rename it if the block ends without error."""
    path = Path(path)
    make_folder(path.parent)
    refuse_special(path)
    try:
        sweep(path.parent)
        handle, name = tempfile.mkstemp(prefix=".", suffix=PARTIAL, dir=path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    temporary = Path(name)
    try:
        _lock(handle)
        with enough_space(path):
            yield temporary
            # mkstemp makes the file private; an ordinary file has the rights that the user's umask leaves.
            temporary.chmod(0o666 & ~_UMASK)
            os.replace(temporary, path)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def refuse_special(path: Path) -> None:
    """Refuse to replace what isn't a regular file."""
    try:
        special = path.is_symlink() or (path.exists() and not path.is_file())
    except OSError as error:
        raise not_written(path, error) from error
    if special:
        raise DataError(f"{path} is a folder, a link or a device, and only a file is replaced; name another one")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty neighbour of a folder, and put it in the folder's place if the block ends without an error."""
    make_folder(path.parent)
    sweep(path.parent)
    made, old = (Path(tempfile.mkdtemp(prefix=".", suffix=PARTIAL, dir=path.parent)) for _ in range(2))
    handles = [os.open(folder, os.O_RDONLY) for folder in (made, old)]
    try:
        for handle in handles:
            _lock(handle)
        made.chmod(0o777 & ~_UMASK)
        with enough_space(path):
            yield made
        if path.is_dir():
            path.rename(old / path.name)
        try:
            made.rename(path)
        except OSError:
            if (old / path.name).is_dir():
                (old / path.name).rename(path)
            raise
    finally:
        for handle in handles:
            os.close(handle)
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing in a folder, once a process; who still writes holds a lock."""
    if fcntl is None or folder.resolve() in _swept:
        return
    _swept.add(folder.resolve())
    for leftover in folder.glob(f".*{PARTIAL}"):
        # The file system may know no locks; then nobody can tell whether the writer lives.
        with suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> None:
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)


def not_written(path: Path | str, error: OSError) -> DataError:
    """Return the error to raise where the system refuses to write a file or to make a folder."""
    if error.errno in FULL:
        return DataError(f"the disk is full: {path} was not written; free some space and run again")
    return DataError(f"{path} can't be written ({error.strerror or error}); name another place, or change its rights")


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from error
    return folder


@contextmanager
def locked(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a lock file, so that one process at a time writes beside it; others wait, or with `busy` are refused so."""
    try:
        lock = FileLock(path, timeout=0 if busy else -1)
        lock.acquire()
    except Timeout:
        raise RunError(busy) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise not_written(path.parent, error) from error
        raise DataError(f"{path.parent} is on a file system without locks; name a folder on another one") from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path | str, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write strict JSON (no NaN, no Infinity: other programs read these files)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; what isn't JSON raises a ValueError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def is_file(path: Path) -> bool:
    """Say whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_yaml_text(path: Path) -> str:
    """Read a YAML file that a user wrote; larger ones than any such file are refused."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(YAML_LIMIT + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} isn't YAML: {error}") from None
    if len(text) > YAML_LIMIT:
        raise RecipeError(f"{path} isn't YAML of a user: it has more than {YAML_LIMIT:,} characters")
    return text


def parse_yaml(text: str, source: str | Path) -> Any:
    """Parse YAML; `source` names it in errors."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except RecursionError:
        raise RecipeError(f"{source} isn't YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that doesn't exist.
        raise RecipeError(f"{source} isn't YAML: {' '.join(str(error).split())}") from None


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML readers keep the last one, and a whole section would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                twice = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def write_yaml(path: Path | str, value: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True))


# A spreadsheet takes a cell that begins so for a formula, and would run what a name from outside holds (CSV injection,
# OWASP). A quote before it keeps it text, and one more is put before those that are there already, so that `read_csv`
# gives every text back. A number is no formula.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def escape_cell(value: Any) -> Any:
    """Return a cell of a CSV that no spreadsheet reads as a formula; what isn't text stays as it is."""
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def _unescape_cell(value: Any) -> Any:
    return value[1:] if isinstance(value, str) and value.startswith("'") and _FORMULA.match(value) else value


def _map_cells(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """Change the head and all cells that can be text."""
    changed = table.rename(columns=change)
    for place, kind in enumerate(table.dtypes):
        if kind.kind not in "biufcmM":
            changed.isetitem(place, table.iloc[:, place].astype(object).map(change).to_numpy())
    return changed


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV without the index, each cell as `escape_cell` makes it."""
    safe = _map_cells(table, escape_cell)
    text = safe.to_csv(index=False, lineterminator="\n")
    # Python's writer doesn't quote a carriage return, and readers take it for the end of the row.
    return safe.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC) if "\r" in text else text


def write_csv(path: Path | str, table: pd.DataFrame) -> None:
    """Write a CSV for people and for `read_csv`, atomically; see `csv_text`."""
    write_text(path, csv_text(table))


def read_csv(path: Path | str, **options: Any) -> pd.DataFrame:
    """Read what `write_csv` wrote; `options` are those of pandas, with the columns' own names."""
    import pandas as pd

    if isinstance(options.get("dtype"), dict):
        options["dtype"] = {escape_cell(name): kind for name, kind in options["dtype"].items()}
    return _map_cells(pd.read_csv(path, **options), _unescape_cell)


def write_tensors(path: Path | str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write torch tensors as a safetensors file, atomically; equal tensors and metadata give equal bytes."""
    from safetensors.torch import save

    # safetensors refuses tensors that share memory or are not contiguous (channels_last weights are not). If it wrote
    # the file itself, a process that is killed would leave one of a random name, which nobody sweeps.
    copies = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    content = memoryview(save(copies, metadata=dict(metadata or {})))
    start = 8 + int.from_bytes(content[:8], "little")
    # The metadata of a header have a random order: the same run must give the same bytes.
    header = json.dumps(json.loads(bytes(content[8:start])), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(content[:8])
        file.write(header.encode().ljust(start - 8))
        file.write(content[start:])


def sha256_of_file(path: Path | str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON (keys sorted, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
