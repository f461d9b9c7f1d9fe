"""The gate before a model is used: a model to which missing metadata mean "benign" is neither exported nor served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualrefnet.deploy.hub import DESCRIPTION, is_bundle
from dualrefnet.errors import RunError
from dualrefnet.files import read_json
from dualrefnet.progress import warn
from dualrefnet.runtime.availability import missingness_shortcut

REMEDY = (
    "train with metadata.tier=M2, metadata.imputation=token and modality_dropout, as the shipped recipes do; or, for research alone, pass "
    "--accept-missingness-shortcut, and everything made of the model carries this warning"
)


def refuse_shortcut(metrics: Mapping[str, Any], source: Path, accepted: bool) -> None:
    """Refuse a model whose referral of cancers rests on metadata being there.

    Args:
        metrics: of the run, or those that its bundle brings.
        source: of the model, for the message.
        accepted: only warn.

    Raises:
        RunError: it is such a model, or this was never measured.
    """
    reason = missingness_shortcut(metrics)
    if reason is None:
        return
    if accepted:
        warn(f"{source}: {reason}")
        return
    if "availability" not in metrics:
        raise RunError(f"{source}: {reason}; `dualrefnet evaluate RUN` measures it (then export the run again)")
    raise RunError(f"{source}: {reason}. {REMEDY[0].upper()}{REMEDY[1:]}")


def measures_of(source: Path) -> Mapping[str, Any]:
    """Return the measures of a run folder or a bundle; empty if there are none."""
    file = source / (DESCRIPTION if is_bundle(source) else "metrics.json")
    if not file.is_file():
        return {}
    found = read_json(file)
    return (found.get("measured") or {}) if is_bundle(source) else found
