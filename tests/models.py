"""Small models, one per way of using parameters; every quantity of the library is compared with the oracle on each."""

import torch
import torch.nn.functional as F
from torch import nn

B = 4


class Residual(nn.Module):
    """In-place ReLU and an in-place residual sum around convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4 * 25, 3)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = torch.tanh(x)
        y = self.second(x)
        y += x
        return self.head(F.relu(y, inplace=True).flatten(1))


class Convolutions(nn.Module):
    """Grouped, depthwise, strided, dilated, even "same" kernels, circular and reflected padding, 1×1."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False),
            nn.Softplus(),
            nn.Conv2d(4, 6, (2, 4), padding="same"),
            nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", dilation=1),
            nn.Tanh(),
            nn.Conv2d(4, 2, 2, padding=(2, 1), dilation=2, padding_mode="reflect", stride=(1, 2)),
            nn.Conv2d(2, 3, 1, padding="valid"),
        )

    def forward(self, x):
        return self.layers(x).tanh().mean((2, 3))


class OneDimensional(nn.Module):
    """Sequence of conv1d and conv3d, the latter on images stacked by ``unflatten``."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, padding=2, stride=2)
        self.three = nn.Conv3d(2, 3, (1, 2, 2), padding=(0, 1, 0))

    def forward(self, x):  # (B, 3, 9)
        y = torch.tanh(self.one(x))  # (B, 4, 6)
        return self.three(y.reshape(len(x), 2, 2, 2, 3)).tanh().flatten(2).mean(2)


class Norms(nn.Module):
    """Group, layer and RMS norm, batch norm in eval mode, a scale, a shift and a positional parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.group = nn.GroupNorm(2, 4)
        self.batch = nn.BatchNorm2d(4).eval()
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))
        self.layer = nn.LayerNorm(9)
        self.rms = nn.RMSNorm((4, 9))
        self.position = nn.Parameter(torch.randn(1, 4, 9))
        self.shift = nn.Parameter(torch.randn(()))
        self.head = nn.Linear(9, 3)
        self.batch.running_mean.normal_()
        self.batch.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.batch(self.group(self.conv(x)).tanh()) * self.gamma
        x = self.layer(x.flatten(2)) + self.position
        x = self.rms(torch.tanh(x)) - self.shift
        x += self.shift * 2
        return self.head(self.gamma.sum() * torch.sin(x)).mean(1)


class Sequence(nn.Module):
    """Linear layers over positions, and over positions merged into the batch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.merged = nn.Linear(6, 4)
        self.frames = nn.Conv1d(1, 2, 3, padding=1)
        self.head = nn.Linear(2, 3, bias=False)

    def forward(self, x):  # (B, 7, 5)
        n, t, _ = x.shape
        x = torch.tanh(self.inner(x)).reshape(n * t, 6)
        x = torch.tanh(self.merged(x)).unsqueeze(1)  # (n t, 1, 4)
        return self.head(self.frames(x).reshape(n, t, 2, 4).mean((1, 3)))


class Functional(nn.Module):
    """The same product written in every way: matmul, @ from both sides, mm, addmm, einsum, a vector."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        for k in range(7):
            self.register_parameter(f"w{k}", nn.Parameter(torch.randn(5, 5, generator=g) / 2))
        self.v = nn.Parameter(torch.randn(5, generator=g))
        self.b = nn.Parameter(torch.randn(5, generator=g))

    def forward(self, x):  # (B, 5)
        x = torch.tanh(x @ self.w0)
        x = torch.tanh(torch.matmul(x, self.w1.t()))
        x = torch.tanh(torch.addmm(self.b, x, self.w2, beta=0.5, alpha=2))
        x = torch.tanh(torch.einsum("bi,oi->bo", x, self.w3))
        x = torch.tanh((self.w4 @ x.t()).t())
        x = torch.tanh(x.mm(self.w5))
        y = torch.einsum("bti,io->bto", torch.stack([x, x * 2], 1), self.w6).sum(1)
        return torch.stack([y @ self.v, y[:, 0], y[:, 1]], 1)


class Tied(nn.Module):
    """One layer used three times at different sizes, one weight in two layers, one bias in two places."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.up = nn.Linear(8, 6, bias=False)
        self.down = nn.Linear(8, 6)
        self.down.weight = self.up.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):  # (B, 2, 4, 4)
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        x = torch.tanh(self.conv(F.avg_pool2d(x, 2))).flatten(1)
        x = torch.tanh(self.up(x)) + torch.sigmoid(self.down(x)) + self.conv.bias.repeat(3)
        return self.head(x) + F.linear(torch.tanh(x), self.head.weight)


class DerivedWeights(nn.Module):
    """Masked, concatenated, indexed, scaled, transposed and normalized weights."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5))
        self.block = nn.Parameter(torch.randn(3, 4) / 2)
        self.stack = nn.Parameter(torch.randn(2, 6, 6) / 2)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.kernel = nn.Parameter(torch.randn(2, 3, 1))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
        self.register_buffer("mask", (torch.arange(20).reshape(4, 5) % 3 > 0).double())

    def forward(self, x):  # (B, 5)
        x = torch.tanh(F.linear(x, self.w * self.mask))
        x = torch.tanh(F.linear(x, torch.cat([self.block, self.block * self.scale.exp()])))
        x = torch.tanh(x @ self.stack[0]) + torch.tanh(x @ self.stack[1].T)
        y = F.conv1d(x.reshape(-1, 1, 6), self.kernel.permute(0, 2, 1), padding=1)
        return self.normed(torch.tanh(x)) + y.mean(2).sum(1, keepdim=True)


class LookUps(nn.Module):
    """Tables in every way of looking up: with padding, in merged rows, from the end, of many dimensions, by position."""

    def __init__(self):
        super().__init__()
        self.padded = nn.Embedding(7, 4, padding_idx=2)
        self.merged = nn.Embedding(7, 4)
        self.indexed = nn.Parameter(torch.randn(7, 2, 2))
        self.selected = nn.Parameter(torch.randn(7, 4))
        self.scores = nn.Parameter(torch.randn(7))
        self.positions = nn.Embedding(5, 4)
        self.doubled = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):  # (B, 5) long
        n, t = tokens.shape
        x = self.padded(tokens) + self.merged(tokens.reshape(-1)).reshape(n, t, 4)
        x = torch.tanh(x + self.indexed[tokens - 7].flatten(2) + self.positions(torch.arange(t)))
        x = x * self.scores[tokens][..., None] + F.embedding(tokens, self.doubled.weight.sin())
        return self.head(torch.tanh(x.mean(1) + self.selected.index_select(0, tokens[:, 0])))


class Bags(nn.Module):
    """Sums with weights that are looked up, too, means of bags of any length, none included, and maxima."""

    def __init__(self):
        super().__init__()
        self.sums, self.means, self.maxima = (nn.Parameter(torch.randn(7, 4)) for _ in range(3))
        self.weights = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):  # (B, 5) long
        n, t = tokens.shape
        start = torch.arange(n) * t
        cut = torch.stack([start, start + tokens[:, 0] % 4], 1).flatten()  # two bags a sample, the first often empty
        x = F.embedding_bag(tokens, self.sums, mode="sum", per_sample_weights=self.weights[tokens], padding_idx=1)
        y = F.embedding_bag(tokens.flatten(), self.means, cut, padding_idx=-3)
        z = F.embedding_bag(
            tokens.flatten(),
            self.maxima,
            torch.cat([cut, cut.new_tensor([n * t])]),
            mode="max",
            include_last_offset=True,
        )
        return self.head(torch.tanh(x) + torch.tanh(y + z.sin()).reshape(n, 2, 4).sum(1))


class TiedTable(nn.Module):
    """A table that tokens are looked up in twice, and that is the output layer's weight, written in two ways."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4, padding_idx=3)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):  # (B, 5) long
        x = torch.tanh(self.inner(self.tokens(tokens) + self.tokens.weight[tokens.flip(1) % 4]))
        return torch.tanh(self.head(x)).mean(1) + x[:, 0].sin() @ self.tokens.weight.T


class Unknown(nn.Module):
    """Operations without a rule: PReLU, bilinear, division, a product of three factors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.form = nn.Parameter(torch.randn(3, 4, 4))
        self.prelu = nn.PReLU(4)
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.temperature = nn.Parameter(torch.full((3,), 1.5))

    def forward(self, tokens):  # (B, 5) long
        x = self.embed(tokens)
        x = self.prelu(x.sum(1)) + torch.sin(x[:, 0])
        return self.bilinear(x, torch.tanh(x)) / self.temperature + torch.einsum("bi,oij,bj->bo", x, self.form, x.sin())


class Frozen(nn.Module):
    """A frozen weight below and above, and a layer whose bias alone is trained."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 4)
        self.third = nn.Conv1d(1, 2, 3)
        self.first.requires_grad_(False)
        self.second.weight.requires_grad_(False)
        self.third.bias.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.third(x.unsqueeze(1)).tanh().mean(2)


class Dropout(nn.Module):
    """Random masks that must be the same in every pass."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)


class Unused(nn.Module):
    """A parameter that the losses do not reach."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 3)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


SHAPES = {
    Residual: (2, 5, 5),
    Convolutions: (2, 9, 8),
    OneDimensional: (3, 9),
    Norms: (2, 5, 5),
    Sequence: (7, 5),
    Functional: (5,),
    Tied: (2, 4, 4),
    DerivedWeights: (5,),
    LookUps: None,
    Bags: None,
    TiedTable: None,
    Unknown: None,
    Frozen: (5,),
    Dropout: (5,),
    Unused: (5,),
}


def make(kind, dtype=torch.float64, batch=B, seed=0):
    """A model, and one batch (x, targets (B, outputs))."""
    torch.manual_seed(seed)
    model = kind().to(dtype)
    shape = SHAPES[kind]
    x = torch.randint(0, 7, (batch, 5)) if shape is None else torch.randn(batch, *shape).to(dtype)
    with torch.no_grad():
        y = model(x)
    return model, x, torch.randn(y.shape).to(y.dtype)


def loss_of(output, target):
    """Smooth losses, (B,)."""
    return (F.softplus(output) - target * output.sin()).flatten(1).sum(1)
