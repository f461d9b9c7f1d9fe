"""The parts that methods are made of: metadata networks, fusions, decision fusion, and the decoders of the auxiliary
task.

The paper's own choice stands first in each group, its ablations and other readings after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor, nn

from dualrefnet.models.base import Output
from dualrefnet.models.encoders import EncoderOutput

# The ablation says "transformer" and no sizes; these are small, since metadata has some dozens of columns.
TOKEN_WIDTH, TOKEN_HEADS, TOKEN_LAYERS = 64, 4, 2


def create_metadata_network(kind: str, metadata_width: int, widths: Sequence[int]) -> nn.Module:
    """Return a network (B, M) -> (B, widths[-1]): `mlp` (the paper's), `attention` or `transformer`."""
    if kind == "transformer":
        return MetadataTransformer(metadata_width, widths[-1])
    if kind == "attention":
        return nn.Sequential(ColumnAttention(metadata_width), metadata_mlp(metadata_width, widths))
    return metadata_mlp(metadata_width, widths)


def metadata_mlp(metadata_width: int, widths: Sequence[int]) -> nn.Sequential:
    """Build phi_meta of the paper, (B, M) -> (B, widths[-1]): linear layers, ReLU after each but the last."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise([metadata_width, *widths]):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def normalised_layers(widths: Sequence[int], dropout: float, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layer, batch normalisation, activation and dropout between each two of the widths."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), activation(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class ColumnAttention(nn.Module):
    """The ablation's "dynamic" weighting: x * sigmoid(W2 relu(W1 x)), (B, M); that both are M wide is our reading."""

    def __init__(self, metadata_width: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(
            nn.Linear(metadata_width, metadata_width),
            nn.ReLU(),
            nn.Linear(metadata_width, metadata_width),
            nn.Sigmoid(),
        )

    def forward(self, metadata: Tensor) -> Tensor:
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
        layer = nn.TransformerEncoderLayer(
            TOKEN_WIDTH, TOKEN_HEADS, 2 * TOKEN_WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, TOKEN_LAYERS, enable_nested_tensor=False)
        self.last = nn.Sequential(nn.LayerNorm(TOKEN_WIDTH), nn.Linear(TOKEN_WIDTH, features))

    def forward(self, metadata: Tensor) -> Tensor:
        tokens = metadata.unsqueeze(2) * self.directions + self.places
        tokens = torch.cat([self.gatherer.expand(len(metadata), -1, -1), tokens], dim=1)
        return self.last(self.layers(tokens)[:, 0])  # type: ignore[no-any-return]


ATTENTION_WIDTH, ATTENTION_HEADS = 512, 4


class Concatenation(nn.Module):
    """FV = [FV_image || FV_meta], equation 3; D + E long."""

    def __init__(self, image_features: int, metadata_features: int) -> None:
        super().__init__()
        self.features = image_features + metadata_features

    def forward(self, encoded: EncoderOutput, metadata: Tensor) -> Tensor:
        return torch.cat([encoded.vector, metadata], dim=1)


class Hadamard(nn.Module):
    """FV = (W FV_image) (.) FV_meta: the other reading of AuxNet's product, both vectors E long."""

    def __init__(self, image_features: int, metadata_features: int) -> None:
        super().__init__()
        self.features = metadata_features
        self.projection = nn.Linear(image_features, metadata_features)

    def forward(self, encoded: EncoderOutput, metadata: Tensor) -> Tensor:
        return self.projection(encoded.vector) * metadata  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """The ablation's cross-attention, four heads of 512 together.

    The paper gives no more than that. Our reading: the metadata vector is the query, the places of the last map and the
    image vector answer, and what they say stands beside the metadata vector: [MHA(W_q m, W_p [v || places]) || W_q m].
    (With the image vector alone attention would have no choice; without it the last normalisation of BEiT would have no
    part.)
    """

    def __init__(self, image_features: int, metadata_features: int) -> None:
        super().__init__()
        self.features = 2 * ATTENTION_WIDTH
        self.places = nn.Linear(image_features, ATTENTION_WIDTH)
        self.question = nn.Linear(metadata_features, ATTENTION_WIDTH)
        self.attention = nn.MultiheadAttention(ATTENTION_WIDTH, ATTENTION_HEADS, batch_first=True)

    def forward(self, encoded: EncoderOutput, metadata: Tensor) -> Tensor:
        assert encoded.map is not None
        tokens = torch.cat([encoded.vector.unsqueeze(1), encoded.map.flatten(2).transpose(1, 2)], dim=1)
        places, question = self.places(tokens), self.question(metadata)
        answer, _ = self.attention(question.unsqueeze(1), places, places, need_weights=False)
        return torch.cat([answer.squeeze(1), question], dim=1)


# Of an encoder's output (D) with a metadata vector (E), by `model.fusion`.
FUSIONS: dict[str, type[Concatenation | Hadamard | CrossAttention]] = {
    "concat": Concatenation,
    "hadamard": Hadamard,
    "cross_attention": CrossAttention,
}


# The simplex is searched in steps of a twelfth, so that equal weights of two, three or four heads are among the
# candidates (91 for three heads).
STEPS = 12


class DecisionFusion(nn.Module):
    """p = sum_k w_k softmax(z_k); the weights (K,) are equal until chosen on validation, and saved with the model."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.weights: Tensor
        self.register_buffer("weights", torch.full((len(names),), 1 / len(names)))

    def forward(self, logits: Tensor) -> Tensor:
        """Mix (K, B, C) logits to the (B, C) logarithms of the mean probabilities."""
        weighted = logits.float().log_softmax(dim=2) + self.weights.log()[:, None, None]
        return weighted.logsumexp(dim=0)

    def output(self, logits: dict[str, Tensor], features: Tensor, hidden: Tensor, training: bool) -> Output:
        """Return the output for the logits (B, C) of every head; in training each has a cross-entropy of its own."""
        if training:
            first, *others = self.names
            return Output(logits[first], features, hidden, None, {name: logits[name] for name in others})
        return Output(self(torch.stack([logits[name] for name in self.names])), features, hidden, None, logits)

    def choose(self, logits: Tensor, labels: Tensor) -> None:
        """Choose the weights with the best balanced accuracy for logits (K, N, C); of equals the most even ones."""
        # Prediction needs none of it.
        from sklearn.metrics import recall_score

        probabilities = logits.float().softmax(dim=2)
        truth = labels.cpu().numpy()
        present = np.unique(truth)
        best, chosen = (-1.0, 0), self.weights
        for counts in product(range(STEPS + 1), repeat=len(self.names)):
            if sum(counts) != STEPS:
                continue
            weights = torch.tensor(counts, dtype=torch.float32, device=probabilities.device) / STEPS
            predicted = torch.einsum("k,knc->nc", weights, probabilities).argmax(dim=1).cpu().numpy()
            score = float(recall_score(truth, predicted, labels=present, average="macro", zero_division=0))
            value = (score, -sum(count**2 for count in counts))
            if value > best:
                best, chosen = value, weights
        self.weights.copy_(chosen.to(self.weights.device))


def plain_decoder(in_features: int, stride: int) -> nn.Sequential:
    """Six up-sampling stages, D-256-128-64-32-16-3: the literal reading of the paper.

    Cost for a 224 px image and D = 1280: 706 M multiply-adds (MobileNet-V2 itself: 300 M), 5.9 M parameters. For stride
    16 the first stage keeps the size.
    """
    widths = (in_features, 256, 128, 64, 32, 16)
    layers: list[nn.Module] = []
    for stage, (before, after) in enumerate(pairwise(widths)):
        if stage == 0 and stride == 16:
            layers.append(nn.Conv2d(before, after, 3, padding=1, bias=False))
        else:
            layers.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    last = nn.ConvTranspose2d(widths[-1], 3, 4, stride=2, padding=1)
    _start_grey(last)
    return nn.Sequential(*layers, last)


def bottleneck_decoder(in_features: int, stride: int) -> nn.Sequential:
    """Six convolutions: a 1x1 bottleneck to 96, four of 3x3 that shuffle their way to an eighth of the output, 1x1 to
    pixels.

    Cost for a 224 px image and D = 1280: 58 M multiply-adds, 0.35 M parameters. Each doubling halves the channels on
    both sides of a convolution, so that the middle ones cost about the same. For stride 16 the second keeps the size.
    """
    last = nn.Conv2d(24, 3 * 8 * 8, 1)
    _start_grey(last)
    _equal_subpixels(last, 8)
    return nn.Sequential(
        _Block(in_features, 96, kernel=1),
        _Block(96, 48, upscale=2 if stride == 32 else 1),
        _Block(48, 24, upscale=2),
        _Block(24, 16, upscale=2),
        _Block(16, 24),
        last,
        _Planes(),
    )


class _Block(nn.Sequential):
    """Convolution, batch norm, ReLU and, if it enlarges, a pixel shuffle: (B,before,h,w) -> (B,after,h u,w u)."""

    def __init__(self, before: int, after: int, kernel: int = 3, upscale: int = 1) -> None:
        convolution = nn.Conv2d(before, after * upscale**2, kernel, padding=kernel // 2, bias=False)
        layers: list[nn.Module] = [convolution, nn.BatchNorm2d(after * upscale**2), nn.ReLU(inplace=True)]
        if upscale > 1:
            _equal_subpixels(convolution, upscale)
            layers.append(nn.PixelShuffle(upscale))
        super().__init__(*layers)


class _Planes(nn.Module):
    """`nn.PixelShuffle`(8) that writes planes: (B,192,h,w) in any memory format -> (B,3,8h,8w), contiguous.

    In one copy: on CPUs that takes about half the time, forward and backward, and at the size of the image it was the
    dearest step of the decoder.
    """

    def forward(self, features: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        subpixels = features.view(batch, 3, 8, 8, height, width)
        return subpixels.permute(0, 1, 4, 2, 5, 3).reshape(batch, 3, 8 * height, 8 * width)


def _equal_subpixels(convolution: nn.Conv2d, upscale: int) -> None:
    """Start the filters of one block of subpixels equal (ICNR, Aitken et al. 2017): no checkerboard before training."""
    weight = convolution.weight.data
    convolution.weight.data = weight[:: upscale**2].repeat_interleave(upscale**2, dim=0)


def _start_grey(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Start with an almost even grey image, which spares the encoder steps that only move the mean."""
    nn.init.normal_(layer.weight, std=0.02)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, 0.5)


# Decoders (B,D,h,w) -> (B,3, 2 h stride, 2 w stride) for targets in 0..1, of an encoder's stride 16 or 32. Their output
# is linear and not clamped: a clamp would have no gradient where it is needed.
DECODERS = {"plain": plain_decoder, "bottleneck": bottleneck_decoder}
