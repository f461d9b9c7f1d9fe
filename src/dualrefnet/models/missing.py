"""Learned tokens for what is missing: a field of the form, the whole form, or the photograph.

A gap is NaN: in the encoded form the columns of a field that isn't known, in a photograph all of its pixels. A token is
learned where training takes things away at random (`training.modality_dropout`), so that one model answers with whatever is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dualrefnet.models.backbones import Encoded, Encoder, EncoderOutput


class MissingInputs(nn.Module):
    """What a method reads in place of what is missing.

    All tokens start at zero: for a standardised number its mean, for categories none.

    Attributes:
        columns: (M,) one number for each column of the encoded form; none if the method reads no form.
        places: for each encoder (D,), in place of its vector and of every place of its map; none if an image is never missing.
        taps: for each tap of each encoder (C_k,), in place of every place of that map.
    """

    def __init__(self, metadata_width: int, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.zeros(metadata_width))
        self.places = nn.ParameterList(nn.Parameter(torch.zeros(encoder.features)) for encoder in encoders)
        self.taps = nn.ParameterList(nn.Parameter(torch.zeros(channels)) for encoder in encoders for channels in encoder.tap_features)

    def form(self, metadata: Tensor) -> Tensor:
        """Put the tokens into the gaps of (B, M) encoded forms."""
        if not len(self.columns):
            return metadata
        return torch.where(metadata.isnan(), self.columns.to(metadata.dtype), metadata)

    def photograph(self, encoded: Encoded) -> Encoded:
        """Put the tokens in place of photographs that aren't there: those whose vectors are NaN."""
        if not len(self.places):
            return encoded
        outputs, taps = [], iter(self.taps)
        for output, place in zip(encoded.outputs, self.places, strict=True):
            absent = output.vector[:, 0].isnan()
            outputs.append(
                EncoderOutput(
                    None if output.map is None else _fill(output.map, place, absent),
                    _fill(output.vector, place, absent),
                    tuple(_fill(tap, next(taps), absent) for tap in output.taps),
                )
            )
        return Encoded(tuple(outputs))


def mark_absent(encoded: Encoded, absent: Tensor) -> Encoded:
    """Make NaN of what was read of photographs that aren't there.

    Args:
        encoded: of B photographs.
        absent: (B,) which of them aren't there.
    """
    gap = torch.tensor(float("nan"))
    return encoded.each(lambda values: _fill(values, gap, absent))


def _fill(values: Tensor, token: Tensor, absent: Tensor) -> Tensor:
    """Replace (B, C, ...) `values` by (C,) or a single number `token` where (B,) `absent`."""
    rest = (1,) * (values.dim() - 2)
    token = token.to(values).reshape(1, -1, *rest)
    return torch.where(absent.reshape(-1, 1, *rest), token, values)
