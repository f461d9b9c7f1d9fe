"""The metadata network: encoded form -> vector. The paper's four layers, and the two others of its ablations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The ablation says "transformer" and no sizes; these are small, since a form has some dozens of columns.
TOKEN_WIDTH, TOKEN_HEADS, TOKEN_LAYERS = 64, 4, 2


def create_metadata_network(kind: str, metadata_width: int, widths: Sequence[int]) -> nn.Module:
    """Return a network (B, M) -> (B, widths[-1]).

    Args:
        kind: `mlp` (the paper's), `attention` or `transformer` (its ablations).
        metadata_width: M.
        widths: layers of the four-layer network; the transformer takes the last one alone.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "mlp":
        return metadata_mlp(metadata_width, widths)
    if kind == "attention":
        return nn.Sequential(ColumnAttention(metadata_width), metadata_mlp(metadata_width, widths))
    if kind == "transformer":
        return MetadataTransformer(metadata_width, widths[-1])
    raise ValueError(f"there is no metadata network {kind!r}; there are: mlp, attention, transformer")


def metadata_mlp(metadata_width: int, widths: Sequence[int]) -> nn.Sequential:
    """Build phi_meta of the paper: fully connected layers of `widths`, ReLU after every layer but the last.

    Maps (B, M) to (B, widths[-1]).
    """
    layers: list[nn.Module] = []
    for number, (narrow, wide) in enumerate(zip([metadata_width, *widths[:-1]], widths, strict=True)):
        layers += [nn.Linear(narrow, wide)] + ([nn.ReLU()] if number + 1 < len(widths) else [])
    return nn.Sequential(*layers)


class ColumnAttention(nn.Module):
    """The ablation's "dynamic" weighting: x -> x * sigmoid(W2 relu(W1 x)), (B, M) -> (B, M).

    Two layers and a sigmoid are stated; that both are M wide is our reading.
    """

    def __init__(self, metadata_width: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(
            nn.Linear(metadata_width, metadata_width), nn.ReLU(), nn.Linear(metadata_width, metadata_width), nn.Sigmoid()
        )

    def forward(self, metadata: Tensor) -> Tensor:
        """Weight each column by what the whole form says."""
        return metadata * self.weights(metadata)  # type: ignore[no-any-return]


class MetadataTransformer(nn.Module):
    """The ablation's transformer: every column is a token, x_j e_j + p_j, beside one that gathers the answer.

    The paper gives no sizes. The reading is the feature tokenizer of Gorishniy et al. 2021 with pre-norm layers.
    """

    def __init__(self, metadata_width: int, features: int) -> None:
        super().__init__()
        scale = TOKEN_WIDTH**-0.5
        self.directions = nn.Parameter(torch.randn(metadata_width, TOKEN_WIDTH) * scale)
        self.places = nn.Parameter(torch.randn(metadata_width, TOKEN_WIDTH) * scale)
        self.gatherer = nn.Parameter(torch.randn(1, 1, TOKEN_WIDTH) * scale)
        layer = nn.TransformerEncoderLayer(TOKEN_WIDTH, TOKEN_HEADS, 2 * TOKEN_WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, TOKEN_LAYERS, enable_nested_tensor=False)
        self.last = nn.Sequential(nn.LayerNorm(TOKEN_WIDTH), nn.Linear(TOKEN_WIDTH, features))

    def forward(self, metadata: Tensor) -> Tensor:
        """Map (B, M) to (B, features)."""
        tokens = metadata.unsqueeze(2) * self.directions + self.places
        tokens = torch.cat([self.gatherer.expand(len(metadata), -1, -1), tokens], dim=1)
        return self.last(self.layers(tokens)[:, 0])  # type: ignore[no-any-return]
