"""Errors whose message tells the user what to do next.

The command line prints them as one line and exits with status 2; everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
SWITCHES = ("resume", "overwrite")


class DualRefNetError(Exception):
    """Base of every error that the user, not the programmer, can fix."""


class DataError(DualRefNetError):
    """The data set on disk, or a table given by the user, is not what it must be."""


class RecipeError(DualRefNetError):
    """A recipe has an unknown key, a wrong value, or two values that contradict each other."""


class SplitError(DualRefNetError):
    """Rows cannot be divided as the protocol demands, or a group crosses the split."""


class WeightsError(DualRefNetError):
    """Requested weights are not available; nothing is ever silently random instead."""


class ImageError(DualRefNetError):
    """One image cannot be decoded, or is outside the limits for untrusted input."""


class RunError(DualRefNetError):
    """A run folder is incomplete, already taken, or belongs to another recipe."""


class DependencyError(DualRefNetError):
    """An optional library isn't installed; the message names the extra that brings it."""


def install_hint(extra: str) -> str:
    """Return the command that installs an extra, from the clone or the wheel that the package was installed from."""
    # Only where something is missing, and not at every start.
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    try:
        origin = json.loads(distribution("dualrefnet").read_text("direct_url.json") or "{}").get("url", "")
    except PackageNotFoundError:
        return f"pip install '.[{extra}]' in the clone"
    return f"pip install '{unquote(urlsplit(origin).path) or 'dualrefnet'}[{extra}]'"


def in_python(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Spell the options in a function's errors as its arguments: `--resume` is `resume=True`, `--out` is `out=`."""

    @wraps(function)
    def spelt(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return function(*arguments, **named)
        except DualRefNetError as error:
            # What stands in backticks is a command.
            parts = str(error).split("`")
            parts[::2] = [re.sub(r"--([a-z][a-z-]*)", _argument, part) for part in parts[::2]]
            raise type(error)("`".join(parts)) from error

    return spelt


def _argument(option: re.Match[str]) -> str:
    name = option[1].replace("-", "_")
    return f"{name}=True" if name in SWITCHES else f"{name}="
