"""The gate before a model is used: a model to which missing metadata mean "benign" is neither exported nor served."""

from __future__ import annotations

from pathlib import Path

from dualrefnet.deploy.hub import DESCRIPTION, is_bundle
from dualrefnet.errors import RunError
from dualrefnet.files import read_json
from dualrefnet.progress import warn
from dualrefnet.runtime.availability import missingness_shortcut

REMEDY = (
    "Train with metadata.tier=M2, metadata.imputation=token and modality_dropout, as the shipped recipes do; or, for research alone, pass "
    "--accept-missingness-shortcut, and everything made of the model carries this warning"
)


def refuse_shortcut(shortcut: str | None, model: Path | str, accepted: bool) -> None:
    """Refuse a model whose referral of cancers rests on metadata being there.

    Args:
        shortcut: from `dualrefnet.runtime.availability.missingness_shortcut`.
        model: its folder or name, for the message.
        accepted: only warn.

    Raises:
        RunError: it is such a model, or this was never measured.
    """
    if shortcut is None:
        return
    if not accepted:
        raise RunError(f"{model}: {shortcut}. {REMEDY}")
    warn(f"{model}: {shortcut}")


def shortcut_of(folder: Path) -> str | None:
    """Return what `missingness_shortcut` says of a run folder or a bundle, from its measures alone; None if the folder holds none."""
    if is_bundle(folder):
        return missingness_shortcut(read_json(folder / DESCRIPTION).get("measured") or {})
    file = folder / "metrics.json"
    return missingness_shortcut(read_json(file)) if file.is_file() else None
