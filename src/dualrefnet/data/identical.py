"""Images that are the same bytes: under one label a repetition, under two a wrong label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dualrefnet.findings import Finding, found_or_pass


def identical_images(images: Iterable[tuple[str, str, str]]) -> Iterator[Finding]:
    """Say which images are identical, those of different labels first.

    Args:
        images: id, label and hash of the bytes (empty: unknown) of every image.
    """
    twins: dict[str, list[tuple[str, str]]] = {}
    for image_id, label, sha256 in images:
        if sha256:
            twins.setdefault(sha256, []).append((image_id, label))
    unlike, alike = [], []
    for group in twins.values():
        if len({label for _, label in group}) > 1:
            unlike.append(" = ".join(f"{image_id} ({label})" for image_id, label in group))
        elif len(group) > 1:
            alike.append(" = ".join(image_id for image_id, _ in group))
    what = "byte-identical images under different labels (at least one label is wrong), groups"
    yield found_or_pass("WARN", "identical_other_label", unlike, what, "no images of different labels are identical")
    what = "byte-identical images under one label (they may stand on both sides of a split), groups"
    yield found_or_pass("WARN", "identical_same_label", alike, what, "no images of one label are identical")
