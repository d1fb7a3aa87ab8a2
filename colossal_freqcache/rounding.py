"""Stochastic rounding to bfloat16 and float16, with random bits that depend on what is rounded and on nothing else.

Rows of 16 bits lose updates of less than half a unit in their last place if they are rounded to the nearest: small
steps add up to nothing. Rounded up or down by chance, in proportion to the distance, a sum of many steps comes out
right on average.

The bits are a hash of (seed, number of the step, id, column), with ids of the logical table and columns of the logical
record: not of slots, positions in a batch, threads or ranks, and there is no state to keep. So a cached table is
rounded as a resident one, and a run that was saved and loaded goes on as one that was not.

    stream           mix64(mix64(seed) + step)                      one a step
    row              mix64(stream + id * 0x9E3779B97F4A7C15)        one a row: its low and high 32 bits are a and b
    random bits      mix32(a + column * 0x9E3779B9, b)              32 an element

A finite value stays finite: what would pass the largest number of the type becomes that number. nan and inf stay.
Both kernel sets compute these same bits: here in torch's int64, which wraps around; `kernels.cpu_halves` in uint32.
Shapes: U rows, W columns.
Source of the mixers: SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195), MurmurHash3's finaliser.
"""

from typing import NamedTuple

import torch

__all__ = ["HALVES", "Rounding", "random_bits", "round_stochastically", "row_keys", "stream_of"]

HALVES = (torch.bfloat16, torch.float16)

GOLDEN64, GOLDEN32 = 0x9E3779B97F4A7C15, 0x9E3779B9
_LOW = 0xFFFFFFFF


class Rounding(NamedTuple):
    """What the random bits of one update depend on.

    stream: of this seed and step, `stream_of`. ids: int64[U], ids of the whole. columns: int64[W], where the columns of
    a local record stand in the logical one.
    """

    stream: int
    ids: torch.Tensor
    columns: torch.Tensor

    def part(self, first: int, last: int) -> "Rounding":
        """That of rows first..last-1."""
        return self._replace(ids=self.ids[first:last])


def stream_of(seed: int, step: int) -> int:
    """The stream of one step, as a signed 64-bit int."""
    keys = _mix64(torch.tensor([_signed(seed)]))
    return int(_mix64(keys + _signed(step)))


def row_keys(rounding: Rounding) -> torch.Tensor:
    """int64[U]: one hash a row."""
    return _mix64(rounding.ids * _signed(GOLDEN64) + rounding.stream)


def random_bits(rounding: Rounding) -> torch.Tensor:
    """int64 (U, W) in 0..2^32-1."""
    keys = row_keys(rounding).unsqueeze(1)
    mixed = ((keys & _LOW) + rounding.columns * GOLDEN32) & _LOW
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _LOW
    mixed = mixed ^ (mixed >> 13) ^ ((keys >> 32) & _LOW)
    mixed = (mixed * 0xC2B2AE35) & _LOW
    return mixed ^ (mixed >> 16)


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, random: torch.Tensor) -> torch.Tensor:
    """`values` (float32) as `dtype`: one of the two neighbours, by `random` (int64 in 0..2^32-1, of their shape)."""
    bits = values.contiguous().view(torch.int32).long()
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded, largest, infinity = (magnitude + (random >> 16)) >> 16, 0x7F7F, 0x7F80
    else:
        rounded, largest, infinity = (magnitude - (112 << 23) + (random >> 19)) >> 13, 0x7BFF, 0x7C00
        units = values.abs() * 2.0**24  # of the subnormal numbers; exact
        below = units.floor()
        up = (random >> 8).float() * 2.0**-24 < units - below
        rounded = torch.where(magnitude < 113 << 23, below.nan_to_num(0, 0, 0).long() + up, rounded)
    rounded = rounded.clamp(max=largest)
    rounded = torch.where(magnitude >= 0x7F800000, infinity + (magnitude > 0x7F800000), rounded)
    return (rounded | ((bits >> 16) & 0x8000)).to(torch.int16).view(dtype)


def _mix64(keys: torch.Tensor) -> torch.Tensor:
    keys = (keys ^ _shifted(keys, 30)) * _signed(0xBF58476D1CE4E5B9)
    keys = (keys ^ _shifted(keys, 27)) * _signed(0x94D049BB133111EB)
    return keys ^ _shifted(keys, 31)


def _shifted(keys: torch.Tensor, places: int) -> torch.Tensor:
    """Shifted right, zeros coming in, as unsigned integers are."""
    return (keys >> places) & ((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    """The int64 with the low 64 bits of `number`."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
