"""DLRM (Naumov et al. 2019, arXiv:1906.00091): bottom MLP, embedding tables, pairwise dots, top MLP.

The embedding module is handed in, so that the cached and the plain model are one piece of code.

Shapes: B samples in a batch, T tables, N ids in a batch, F dense features, D embedding width, V = T + 1 vectors.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["DLRM", "PlainTables", "uniform_rows"]


class PlainTables(nn.Module):
    """The uncached twin of FreqAwareEmbeddingBagCollection: one torch.nn.EmbeddingBag per table, all in memory.

    Same call, same output, and the same initial weights under the same `torch.manual_seed`."""

    def __init__(
        self,
        table_sizes: Sequence[int],
        embedding_dim: int,
        mode: str = "mean",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(size, embedding_dim, mode=mode, sparse=True, dtype=dtype) for size in table_sizes
        )

    def init_(self, fn: Callable[[Tensor], None]) -> None:
        """Calls `fn` in place on each table (rows, D), in table order."""
        with torch.no_grad():
            for table in self.tables:
                fn(table.weight)

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        """values: (N,) int64 ids local to their table, table-major. offsets: (T*B,) int64. Returns (B, T, D)."""
        num_tables = len(self.tables)
        if offsets.numel() % num_tables:
            raise ValueError(
                f"{offsets.numel()} offsets do not divide by {num_tables} tables: one per table and sample"
            )
        batch_size = offsets.numel() // num_tables
        start = [*offsets[::batch_size].tolist(), values.numel()] if batch_size else [0] * (num_tables + 1)
        bags = [
            table(values[start[t] : start[t + 1]], offsets[t * batch_size : (t + 1) * batch_size] - start[t])
            for t, table in enumerate(self.tables)
        ]
        return torch.stack(bags, dim=1)


def uniform_rows(bound: float) -> Callable[[Tensor], None]:
    """An initialiser for `init_`: every weight uniform in [-bound, bound], drawn in row order, in float32."""

    def fill(rows: Tensor) -> None:
        rows.copy_(torch.empty_like(rows, dtype=torch.float32).uniform_(-bound, bound))

    return fill


def _mlp(widths: Iterable[int], last_is_linear: bool) -> nn.Sequential:
    widths = list(widths)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        # as in the paper's code: weights N(0, 2 / (fan_in + fan_out)), biases N(0, 1 / fan_out)
        nn.init.normal_(linear.weight, std=(2.0 / (fan_in + fan_out)) ** 0.5)
        nn.init.normal_(linear.bias, std=(1.0 / fan_out) ** 0.5)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*(layers[:-1] if last_is_linear else layers))


class DLRM(nn.Module):
    """logit = top([x, <v_i, v_j> for i < j]) with x = bottom(dense) (B, D) and v the T bags and x, (B, V, D).

    Args:
        embedding (nn.Module): called as `embedding(values, offsets)`, returns (B, T, D) of any float type.
        num_tables (int), embedding_dim (int), num_dense (int): T, D and F.
        bottom (Sequence[int]): hidden widths of the bottom MLP (its last layer of width D is added).
        top (Sequence[int]): hidden widths of the top MLP (its last layer of width 1 is added).
        dense_seed (int): seeds the two MLPs alone, so that they do not depend on how the embedding was built.
    """

    def __init__(
        self,
        embedding: nn.Module,
        num_tables: int,
        embedding_dim: int,
        num_dense: int,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (128, 64),
        dense_seed: int = 0,
    ):
        super().__init__()
        self.embedding = embedding
        num_vectors = num_tables + 1
        num_pairs = num_vectors * (num_vectors - 1) // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(dense_seed)
            self.bottom = _mlp([num_dense, *bottom, embedding_dim], last_is_linear=False)
            self.top = _mlp([embedding_dim + num_pairs, *top, 1], last_is_linear=True)
        pair = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self.register_buffer("flat_pairs", pair[0] * num_vectors + pair[1], persistent=False)

    def forward(self, dense: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        """dense: (B, F) float32. values: (N,) and offsets: (T*B,) int64, table-major. Returns logits (B,)."""
        x = self.bottom(dense)  # (B, D)
        bags = self.embedding(values, offsets).to(x.dtype)  # (B, T, D)
        vectors = torch.cat([x.unsqueeze(1), bags], dim=1)  # (B, V, D)
        dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)  # (B, V*V)
        return self.top(torch.cat([x, dots.index_select(1, self.flat_pairs)], dim=1)).squeeze(1)
