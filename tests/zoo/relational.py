"""Networks on sequences, graphs, tables and sets, and networks that make or adapt weights, written out."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .architecture import CLASSES


class LSTMCell(nn.Module):
    """Source: Hochreiter and Schmidhuber 1997."""

    def __init__(self, inputs, width):
        super().__init__()
        self.of_input = nn.Linear(inputs, 4 * width)
        self.of_state = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x, state):
        h, c = state
        i, f, g, o = (self.of_input(x) + self.of_state(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Tagger(nn.Module):
    """A tag for each word, by a cell written out, or by torch's own layers in both directions."""

    def __init__(self, words, width=12, own=True):
        super().__init__()
        self.words = nn.Embedding(words, 8, padding_idx=0)
        self.recurrent = LSTMCell(8, width) if own else nn.LSTM(8, width, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(width if own else 2 * width, CLASSES)
        self.own = own

    def forward(self, words):
        x = self.words(words)
        if not self.own:
            return self.head(self.recurrent(x)[0])
        state, out = (torch.zeros(len(x), self.head.in_features, dtype=x.dtype),) * 2, []
        for word in x.unbind(1):
            state = self.recurrent(word, state)
            out.append(state[0])
        return self.head(torch.stack(out, 1))


class GraphConvolutions(nn.Module):
    """H' = σ(D^{-1/2} A D^{-1/2} H W + b), on a batch of dense graphs. Source: arXiv 1609.02907."""

    def __init__(self, features=5, width=16):
        super().__init__()
        sizes = ((features, width), (width, width))
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in sizes])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, nodes, edges):  # (B, N, features), (B, N, N)
        edges = edges + torch.eye(edges.size(1), dtype=edges.dtype)
        d = edges.sum(2).rsqrt()
        edges = edges * d.unsqueeze(1) * d.unsqueeze(2)
        for w, b in zip(self.weights, self.biases, strict=True):
            nodes = F.elu(edges @ (nodes @ w) + b)
        return self.head(nodes.mean(1))


class GraphAttention(nn.Module):
    """Means of neighbors by softmax_j leaky(⟨a, W h_i⟩ + ⟨a', W h_j⟩). Source: arXiv 1710.10903."""

    def __init__(self, features=5, width=8, heads=2):
        super().__init__()
        self.w = nn.Linear(features, width * heads, bias=False)
        self.left = nn.Parameter(torch.zeros(heads, width))
        self.right = nn.Parameter(torch.zeros(heads, width))
        self.head = nn.Linear(width * heads, CLASSES)

    def forward(self, nodes, edges):
        h = self.w(nodes).unflatten(-1, self.left.shape)  # (B, N, heads, width)
        left, right = (h * self.left).sum(-1), (h * self.right).sum(-1)
        scores = F.leaky_relu(left.unsqueeze(2) + right.unsqueeze(1), 0.2)  # (B, N, N, heads)
        scores = scores.masked_fill(edges.unsqueeze(-1) == 0, -math.inf)
        out = torch.einsum("bijh,bjhw->bihw", scores.softmax(2), h)
        return self.head(F.elu(out.flatten(2)).mean(1))


class DLRM(nn.Module):
    """Clicks from numbers, bags of categories, and the products of all their vectors. Source: arXiv 1906.00091."""

    def __init__(self, numbers=5, categories=(11, 7, 13), modes=("sum", "mean", "sum"), width=8):
        super().__init__()
        self.bags = nn.ModuleList(
            [nn.EmbeddingBag(n, width, mode=mode) for n, mode in zip(categories, modes, strict=True)]
        )
        self.bottom = nn.Sequential(nn.Linear(numbers, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        self.register_buffer("pairs", torch.tril_indices(len(categories) + 1, len(categories) + 1, -1))
        self.top = nn.Sequential(nn.Linear(width + self.pairs.size(1), 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, numbers, *categories):
        dense = self.bottom(numbers)
        vectors = torch.stack([dense, *(bag(c) for bag, c in zip(self.bags, categories, strict=True))], 1)
        products = (vectors @ vectors.mT)[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], 1)).squeeze(1)


class PointNet(nn.Module):
    """Source: arXiv 1612.00593."""

    def __init__(self):
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 16, 1), nn.PReLU(16), nn.Conv1d(16, 24, 1), nn.PReLU())
        self.head = nn.Sequential(nn.Linear(24, 16), nn.PReLU(), nn.Linear(16, CLASSES))

    def forward(self, x):  # (B, 3, N)
        return self.head(self.points(x).amax(2))


class Queries(nn.Module):
    """A transformer whose decoder begins with queries of the model's own. Source: arXiv 2005.12872."""

    def __init__(self, width=16, queries=4):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.transformer = nn.Transformer(width, 2, 1, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.transformer(x, self.queries.expand(len(x), -1, -1))).mean(1)


class HyperNetwork(nn.Module):
    """A network whose weights are another's output. Source: arXiv 1609.09106."""

    def __init__(self, features=5, width=12):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(2, 6))
        self.made = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, width * (width + 1)))
        self.inside, self.head = nn.Linear(features, width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.inside(x)
        n = x.size(1)
        for code in self.codes:
            weight, bias = self.made(code).split([n * n, n])
            x = torch.tanh(F.linear(x, weight.view(n, n), bias))
        return self.head(x)


class LoRA(nn.Module):
    """A frozen layer, and one of few ranks added to its weight. Source: arXiv 2106.09685."""

    def __init__(self, width=12, rank=2):
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))

    def forward(self, x):
        return F.linear(x, self.frozen.weight + 2 * self.up @ self.down, self.frozen.bias)
