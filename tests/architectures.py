"""Small float64 models of every common kind, to be held against dense matrices.

The names say what is special. Models are built on first use; treat them as read-only.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.cases import Case, seeded

NUM = 3
LABELS = torch.tensor([0, 2, 1])
CROSS_ENTROPY = nn.CrossEntropyLoss()

BUILDERS: dict[str, Callable[[], Case]] = {}


@lru_cache
def architecture(name: str) -> Case:
    """Return a case by name; the model is in evaluation mode."""
    case: Case = seeded(BUILDERS[name])
    case.model.eval()
    return case


def names(prefix: str = "") -> list[str]:
    return [name for name in BUILDERS if name.startswith(prefix)]


def add(
    name: str,
    model: Callable[[], nn.Module],
    data: Callable[[], Any],
    criterion: Any = CROSS_ENTROPY,
    **options: Any,
) -> None:
    """Register a case. One sample's loss is the criterion on a batch of one, unless said."""

    def build() -> Case:
        built = data()
        batch = built if isinstance(built, dict | tuple) else (built, LABELS)
        settings = {"sample_loss": criterion, **options}
        return Case(name=name, model=model(), criterion=criterion, data=batch, **settings)

    BUILDERS[name] = build


def randn(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(NUM, *shape)


def flat(*layers: nn.Module) -> nn.Module:
    """Layers, then a mean over positions, giving three logits."""
    return nn.Sequential(*layers, nn.Flatten(2), MeanOverLast())


class MeanOverLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=-1)


class Apply(nn.Module):
    """A forward pass given as a function of (modules, *inputs)."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.parts, *inputs)


def settled(norm: nn.Module) -> nn.Module:
    """Give a batch norm statistics and weights as after training."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.affine:
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    return norm


def bn1(channels: int, **options: Any) -> nn.Module:
    return settled(nn.BatchNorm1d(channels, **options))


def bn2(channels: int, **options: Any) -> nn.Module:
    return settled(nn.BatchNorm2d(channels, **options))


def bn3(channels: int, **options: Any) -> nn.Module:
    return settled(nn.BatchNorm3d(channels, **options))


# Multilayer perceptrons: activations, norms, losses.

for activation in (nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.Mish, nn.ReLU, nn.PReLU):
    add(
        f"MLP {activation.__name__}",
        lambda activation=activation: nn.Sequential(
            nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)
        ),
        randn(4),
    )


def tanh_net(*middle: nn.Module, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, outputs))


def regression() -> tuple[Tensor, Tensor]:
    return torch.randn(NUM, 4), torch.randn(NUM, 2)


for loss in (nn.MSELoss, nn.SmoothL1Loss, nn.HuberLoss):
    for reduction in ("mean", "sum"):
        add(
            f"loss {loss.__name__} {reduction}",
            lambda: tanh_net(outputs=2),
            regression,
            loss(reduction=reduction),
        )
add(
    "loss BCEWithLogits",
    lambda: tanh_net(outputs=2),
    lambda: (torch.randn(NUM, 4), torch.rand(NUM, 2)),
    nn.BCEWithLogitsLoss(),
)
add(
    "loss BCEWithLogits sum",
    lambda: tanh_net(outputs=2),
    lambda: (torch.randn(NUM, 4), torch.rand(NUM, 2)),
    nn.BCEWithLogitsLoss(reduction="sum"),
)
add("loss cross entropy sum", tanh_net, randn(4), nn.CrossEntropyLoss(reduction="sum"))
add(
    "loss cross entropy smoothed",
    tanh_net,
    randn(4),
    nn.CrossEntropyLoss(label_smoothing=0.2),
)
add(
    "loss cross entropy of probabilities",
    tanh_net,
    lambda: (torch.randn(NUM, 4), torch.rand(NUM, 3)),
)
add(
    "loss negative log-likelihood",
    lambda: nn.Sequential(tanh_net(), nn.LogSoftmax(dim=1)),
    randn(4),
    nn.NLLLoss(),
)
add(
    "loss Poisson",
    lambda: tanh_net(outputs=2),
    lambda: (torch.randn(NUM, 4), torch.rand(NUM, 2)),
    nn.PoissonNLLLoss(),
)
add("norm LayerNorm", lambda: tanh_net(nn.LayerNorm(5)), randn(4))
add("norm RMSNorm", lambda: tanh_net(nn.RMSNorm(5)), randn(4))
add("norm BatchNorm1d", lambda: tanh_net(bn1(5)), randn(4))
add("norm BatchNorm1d first", lambda: nn.Sequential(bn1(4), tanh_net()), randn(4))
add(
    "norm BatchNorm1d over a sequence",
    lambda: flat(nn.Conv1d(2, 4, 2), bn1(4), nn.Tanh(), nn.Conv1d(4, 3, 1)),
    randn(2, 5),
)
add("norm BatchNorm1d without weights", lambda: tanh_net(bn1(5, affine=False)), randn(4))
add("bilinear", lambda: Apply(
    lambda m, a, b: m["mix"](a, b).tanh(), mix=nn.Bilinear(3, 4, 3)
), lambda: (torch.randn(NUM, 3), torch.randn(NUM, 4), LABELS))  # fmt: skip
add(
    "weight norm",
    lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    randn(4),
)
add(
    "spectral norm",
    lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 5)).eval(), nn.Tanh(), nn.Linear(5, 3)
    ),
    randn(4),
)
add("GLU", lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 3)), randn(4))

# Convolutions: every option in one, two and three dimensions.

CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3}, (6,)),
    "1d strided, padded": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (7,)),
    "1d same, dilated": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 2}, (7,)),
    "2d": (nn.Conv2d, {"kernel_size": 3}, (5, 5)),
    "2d pointwise": (nn.Conv2d, {"kernel_size": 1}, (3, 3)),
    "2d without bias": (nn.Conv2d, {"kernel_size": 3, "bias": False}, (4, 4)),
    "2d strided": (nn.Conv2d, {"kernel_size": 2, "stride": 2}, (5, 5)),
    "2d uneven": (
        nn.Conv2d,
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        (5, 6),
    ),
    "2d same": (nn.Conv2d, {"kernel_size": 3, "padding": "same"}, (4, 4)),
    "2d same, even kernel": (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}, (4, 5)),
    "2d valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid"}, (4, 4)),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (4, 4)),
    "2d replicate": (
        nn.Conv2d,
        {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
        (4, 4),
    ),
    "2d circular, strided": (
        nn.Conv2d,
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
        (4, 5),
    ),
    "2d dilated": (nn.Conv2d, {"kernel_size": 2, "dilation": 2, "padding": 1}, (4, 5)),
    "2d grouped": (nn.Conv2d, {"kernel_size": 2, "groups": 2}, (4, 4)),
    "2d depthwise": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "padding": 1}, (4, 4)),
    "2d larger padding than kernel": (nn.Conv2d, {"kernel_size": 2, "padding": 2}, (3, 3)),
    "2d rows that the stride leaves out": (nn.Conv2d, {"kernel_size": 2, "stride": 3}, (7, 6)),
    "3d": (nn.Conv3d, {"kernel_size": 2}, (3, 3, 3)),
    "3d strided, padded": (
        nn.Conv3d,
        {"kernel_size": (1, 2, 2), "stride": (1, 2, 1), "padding": (0, 1, 0)},
        (2, 3, 3),
    ),
    "transposed 1d": (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2}, (4,)),
    "transposed 2d": (
        nn.ConvTranspose2d,
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        (3, 3),
    ),
    "transposed 2d grouped": (nn.ConvTranspose2d, {"kernel_size": 2, "groups": 2}, (3, 3)),
    "transposed 2d dilated": (nn.ConvTranspose2d, {"kernel_size": 2, "dilation": 2}, (3, 3)),
    "transposed 3d": (nn.ConvTranspose3d, {"kernel_size": 2}, (2, 2, 2)),
}


def convolutional(kind: type[nn.Module], options: dict[str, Any], dims: int) -> nn.Module:
    """A pointwise layer before, so that the input needs a gradient too, and a head behind."""
    point: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return flat(point(1, 4, 1), nn.Tanh(), kind(4, 4, **options), nn.Softplus(), point(4, 3, 1))


for name, (kind, options, image) in CONVOLUTIONS.items():
    add(
        f"conv {name}",
        lambda kind=kind, options=options, image=image: convolutional(kind, options, len(image)),
        randn(1, *image),
    )
    add(
        f"conv {name}, first layer",
        lambda kind=kind, options=options, image=image: flat(
            kind(4, 4, **options),
            nn.Softplus(),
            {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(image)](4, 3, 1),
        ),
        randn(4, *image),
    )


def frozen(module: nn.Module, *pieces: str) -> nn.Module:
    for name, p in module.named_parameters():
        p.requires_grad_(name not in pieces)
    return module


def convolve_by_hand(m: Any, x: Tensor) -> Tensor:
    """One kernel used three times, by keyword and by position."""
    kernel, bias = m["conv"].weight, m["conv"].bias
    x = F.conv2d(x, kernel, bias, padding=1).tanh()
    x = torch.conv2d(x, weight=kernel, stride=[2, 1], padding=1).tanh()
    return F.conv2d(input=x, weight=kernel, bias=bias, padding=(1, 0)).flatten(2).mean(-1)


def skip_connection(m: Any, x: Tensor) -> Tensor:
    """The convolution's output goes to its batch norm and past it."""
    z = m["conv"](x)
    return m["head"]((m["norm"](z) + z.sin()).tanh()).flatten(2).mean(-1)


def two_norms_of_one(m: Any, x: Tensor) -> Tensor:
    z = m["conv"](x)
    return m["head"]((m["norm"](z) * m["other"](z)).tanh()).flatten(2).mean(-1)


def norm_of_earlier(m: Any, x: Tensor) -> Tensor:
    """Another convolution runs between a convolution and its batch norm."""
    z = m["conv"](x)
    other = m["between"](x)
    return m["head"]((m["norm"](z) + other).tanh()).flatten(2).mean(-1)


def residual(m: Any, x: Tensor) -> Tensor:
    """A basic residual block as in torchvision, activations in place."""
    x = m["stem"](x)
    out = F.relu(m["norm1"](m["conv1"](x)), inplace=True)
    out = m["norm2"](m["conv2"](out))
    out += x
    return m["head"](F.softplus(out)).flatten(2).mean(-1)


def changed_in_place(m: Any, x: Tensor) -> Tensor:
    """What a convolution returned is changed before its batch norm sees it."""
    z = m["conv"](x)
    z.mul_(2.0)
    return m["head"](m["norm"](z).tanh_()).flatten(2).mean(-1)


def by_keyword(m: Any, x: Tensor) -> Tensor:
    n = m["norm"]
    z = F.batch_norm(
        m["conv"](x), n.running_mean, n.running_var, weight=n.weight, bias=n.bias, eps=0.1
    )
    return m["head"](z.tanh()).flatten(2).mean(-1)


def norm_with_weight_only(m: Any, x: Tensor) -> Tensor:
    n = m["norm"]
    z = F.batch_norm(m["conv"](x), n.running_mean, n.running_var, n.weight)
    return m["head"](z.tanh()).flatten(2).mean(-1)


def head(channels: int = 4) -> nn.Module:
    return nn.Conv2d(channels, 3, 1)


PLAIN = {"conv": lambda: nn.Conv2d(2, 4, 2), "norm": lambda: bn2(4), "head": head}
COMPOSED: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[[], nn.Module]]]] = {
    "kernel used three times": (convolve_by_hand, {"conv": lambda: nn.Conv2d(3, 3, 3)}),
    "skip past the norm": (skip_connection, PLAIN),
    "two norms of one": (two_norms_of_one, {**PLAIN, "other": lambda: bn2(4)}),
    "norm of an earlier one": (
        norm_of_earlier,
        {**PLAIN, "between": lambda: nn.Conv2d(2, 4, 2, bias=False)},
    ),
    "residual block": (
        residual,
        {
            "stem": lambda: nn.Conv2d(2, 3, 1),
            "conv1": lambda: nn.Conv2d(3, 3, 3, padding=1, bias=False),
            "norm1": lambda: bn2(3),
            "conv2": lambda: nn.Conv2d(3, 3, 3, padding=1, bias=False),
            "norm2": lambda: bn2(3),
            "head": lambda: head(3),
        },
    ),
    "changed in place before the norm": (changed_in_place, PLAIN),
    "norm by keyword": (by_keyword, PLAIN),
    "norm with weight only": (norm_with_weight_only, PLAIN),
}
for name, (function, parts) in COMPOSED.items():
    add(
        f"conv {name}",
        lambda function=function, parts=parts: Apply(
            function, **{key: make() for key, make in parts.items()}
        ),
        randn(3, 3, 3) if function is convolve_by_hand else randn(2, 3, 3),
    )

NORMED = {
    "BatchNorm2d": lambda: flat(nn.Conv2d(2, 4, 2), bn2(4), nn.Tanh(), head()),
    "BatchNorm2d, no bias": lambda: flat(
        nn.Conv2d(2, 4, 2, bias=False), bn2(4, eps=0.3), nn.Tanh(), head()
    ),
    "BatchNorm2d without weights": lambda: flat(
        nn.Conv2d(2, 4, 2), bn2(4, affine=False), nn.Tanh(), head()
    ),
    "BatchNorm2d first": lambda: flat(bn2(2), nn.Conv2d(2, 4, 2), nn.Tanh(), head()),
    "BatchNorm2d before the activation's conv": lambda: flat(
        nn.Conv2d(2, 4, 2), nn.Tanh(), bn2(4), head()
    ),
    "BatchNorm2d twice": lambda: flat(nn.Conv2d(2, 4, 2), bn2(4), bn2(4), nn.Tanh(), head()),
    "BatchNorm2d, grouped": lambda: flat(
        nn.Conv2d(2, 4, 2, groups=2), bn2(4), nn.Tanh(), head()
    ),
    "BatchNorm2d after a transposed convolution": lambda: flat(
        nn.ConvTranspose2d(2, 4, 2), bn2(4), nn.Tanh(), head()
    ),
    "BatchNorm2d, frozen kernel": lambda: flat(
        frozen(nn.Conv2d(2, 4, 2), "weight"), bn2(4), nn.Tanh(), head()
    ),
    "BatchNorm2d, frozen bias": lambda: flat(
        frozen(nn.Conv2d(2, 4, 2), "bias"), bn2(4), nn.Tanh(), head()
    ),
    "BatchNorm2d with frozen weight": lambda: flat(
        nn.Conv2d(2, 4, 2), frozen(bn2(4), "weight"), nn.Tanh(), head()
    ),
    "BatchNorm2d frozen whole": lambda: flat(
        nn.Conv2d(2, 4, 2), frozen(bn2(4), "weight", "bias"), nn.Tanh(), head()
    ),
    "only BatchNorm2d trains": lambda: flat(
        frozen(nn.Conv2d(2, 4, 2), "weight", "bias"), bn2(4), nn.Tanh(),
        frozen(head(), "weight", "bias"),
    ),
    "SyncBatchNorm": lambda: flat(
        nn.Conv2d(2, 4, 2), settled(nn.SyncBatchNorm(4)), nn.Tanh(), head()
    ),
    "GroupNorm": lambda: flat(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), head()),
    "InstanceNorm": lambda: flat(
        nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), head()
    ),
    "LayerNorm": lambda: flat(
        nn.Conv2d(2, 4, 2), nn.LayerNorm([4, 2, 2]), nn.Tanh(), head()
    ),
    "in-place activations and pooling": lambda: flat(
        nn.Conv2d(2, 4, 2, padding=1), bn2(4), nn.ELU(inplace=True), nn.MaxPool2d(2), head()
    ),
    "average pooling": lambda: flat(
        nn.Conv2d(2, 4, 2, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(2), head()
    ),
    "upsampling and shuffling": lambda: flat(
        nn.Conv2d(2, 4, 2), nn.Tanh(), nn.PixelShuffle(2), nn.Upsample(scale_factor=2),
        nn.Conv2d(1, 3, 2),
    ),
    "dropout in evaluation mode": lambda: flat(
        nn.Conv2d(2, 4, 2), nn.Dropout2d(0.5), nn.Tanh(), head()
    ),
    "channels last": lambda: flat(nn.Conv2d(2, 4, 2), bn2(4), nn.Tanh(), head()).to(
        memory_format=torch.channels_last
    ),
    "weight norm": lambda: flat(
        parametrizations.weight_norm(nn.Conv2d(2, 4, 2)), bn2(4), nn.Tanh(), head()
    ),
}  # fmt: skip
for name, model in NORMED.items():
    add(f"CNN {name}", model, randn(2, 3, 3))
add(
    "CNN in three dimensions",
    lambda: flat(nn.Conv3d(1, 4, 2), bn3(4), nn.Tanh(), nn.Conv3d(4, 3, 1)),
    randn(1, 3, 3, 2),
)

# Recurrent networks.


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(2, 2, batch_first=True, **options)
        width = options.get("proj_size", 0) or 2
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(dim=1))


class Packed(Recurrent):
    """Sequences of different lengths, packed."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
        return self.head(out.sum(dim=1) / lengths[:, None])


RECURRENT: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, two layers, both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM with projection": (nn.LSTM, {"proj_size": 1}),
    "LSTM without bias": (nn.LSTM, {"bias": False}),
    "GRU": (nn.GRU, {}),
    "GRU, two layers, both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "RNN": (nn.RNN, {}),
    "RNN, ReLU, both ways": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}
for name, (kind, options) in RECURRENT.items():
    add(
        f"recurrent {name}",
        lambda kind=kind, options=options: Recurrent(kind, **options),
        randn(3, 2),
    )
for kind in (nn.LSTM, nn.GRU):
    add(
        f"recurrent {kind.__name__}, packed",
        lambda kind=kind: Packed(kind),
        lambda: (torch.randn(NUM, 3, 2), torch.tensor([3, 1, 2]), LABELS),
    )


def cells(m: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), 3)
    for step in x.unbind(dim=1):
        h, c = m["lstm"](step, (h, c))
        h = m["gru"](step, h)
    return h


add(
    "recurrent cells",
    lambda: Apply(cells, lstm=nn.LSTMCell(2, 3), gru=nn.GRUCell(2, 3)),
    randn(3, 2),
)

# Attention, by default kernels.


def self_attention(m: Any, x: Tensor) -> Tensor:
    return m["head"](m["attention"](x, x, x)[0].mean(dim=1))


def causal_attention(m: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    out = m["attention"](x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    return m["head"](out.mean(dim=1))


def fused(**options: Any) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m["qkv"](x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        given = {key: value() if callable(value) else value for key, value in options.items()}
        out = F.scaled_dot_product_attention(q, k, v, **given)
        return m["head"](out.transpose(1, 2).flatten(2).mean(dim=1))

    return forward


def attention(function: Callable[..., Tensor], **options: Any) -> nn.Module:
    return Apply(
        function,
        attention=nn.MultiheadAttention(4, 2, batch_first=True, **options),
        head=nn.Linear(4, 3),
    )


def padded(m: Any, x: Tensor, pad: Tensor) -> Tensor:
    return m["head"](m["layer"](x, src_key_padding_mask=pad)[:, 0])


def decoder(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    return m["head"](m["layer"](x, memory).mean(dim=1))


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, batch_first=True, **options)


def pads() -> Tensor:
    return torch.arange(3) >= torch.tensor([3, 1, 2])[:, None]


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "MultiheadAttention": lambda: attention(self_attention),
    "MultiheadAttention, causal": lambda: attention(causal_attention),
    "MultiheadAttention, bias to keys": lambda: attention(self_attention, add_bias_kv=True),
    "encoder layer": lambda: nn.Sequential(encoder_layer(), nn.Flatten(), nn.Linear(12, 3)),
    "encoder layer, norm first, GELU": lambda: nn.Sequential(
        encoder_layer(norm_first=True, activation="gelu"), nn.Flatten(), nn.Linear(12, 3)
    ),
    **{
        f"scaled_dot_product_attention {name}": lambda options=options: Apply(
            fused(**options), qkv=nn.Linear(4, 12), head=nn.Linear(4, 3)
        )
        for name, options in {
            "plain": {},
            "causal": {"is_causal": True},
            "boolean mask": {"attn_mask": lambda: torch.ones(3, 3).tril().bool()},
            "additive mask": {"attn_mask": lambda: torch.linspace(-1, 1, 9).view(3, 3).double()},
            "scaled": {"scale": 0.3},
        }.items()
    },
}
for name, model in ATTENTION.items():
    add(f"attention {name}", model, randn(3, 4))
add(
    "attention encoder layer, padded",
    lambda: Apply(padded, layer=encoder_layer(), head=nn.Linear(4, 3)),
    lambda: (torch.randn(NUM, 3, 4), pads(), LABELS),
)
add(
    "attention decoder layer",
    lambda: Apply(
        decoder,
        layer=nn.TransformerDecoderLayer(4, 2, dim_feedforward=3, batch_first=True),
        head=nn.Linear(4, 3),
    ),
    lambda: (torch.randn(NUM, 2, 4), torch.randn(NUM, 3, 4), LABELS),
)


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, one encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer, self.head = encoder_layer(norm_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.layer(x)[:, 0])


add("attention vision transformer", VisionTransformer, randn(1, 4, 4))

# Language models and embeddings.


class LanguageModel(nn.Module):
    """The head's weight is the embedding's own parameter; logits of shape [n, classes, time]."""

    def __init__(self, mixer: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.mixer = nn.GRU(4, 4, batch_first=True) if mixer == "GRU" else encoder_layer()
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if isinstance(self.mixer, nn.GRU):
            x = self.mixer(x)[0]
        else:
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            x = self.mixer(x, src_mask=causal, is_causal=True)
        return self.head(x).transpose(1, 2)


def tokens() -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 6, (NUM, 4))
    return x, (x + 1) % 6


add("language model GRU, tied", lambda: LanguageModel("GRU"), tokens)
add("language model transformer, tied", lambda: LanguageModel("transformer"), tokens)
add(
    "embedding with padding",
    lambda: nn.Sequential(
        nn.Embedding(6, 3, padding_idx=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)
    ),
    lambda: torch.randint(0, 6, (NUM, 3)),
)

# Which parameters make up w.

add(
    "subset by pattern",
    lambda: VisionTransformer(),
    randn(1, 4, 4),
    parameters=["layer.self_attn.*", "head.bias"],
)
add(
    "subset by predicate",
    lambda: flat(nn.Conv2d(2, 4, 2), bn2(4), nn.Tanh(), head()),
    randn(2, 3, 3),
    parameters=lambda name, p: p.ndim == 1 and not name.startswith("3"),
)
add(
    "subset behind frozen layers",
    lambda: nn.Sequential(
        frozen(nn.Linear(4, 5), "weight", "bias"), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(),
        frozen(nn.Linear(4, 3), "weight"),
    ),
    randn(4),
)  # fmt: skip
add(
    "subset in front of frozen layers",
    lambda: nn.Sequential(
        nn.Linear(4, 3), nn.Tanh(), frozen(nn.Linear(3, 3), "weight", "bias"), bn1(3)
    ),
    randn(4),
    parameters="0.*",
)
