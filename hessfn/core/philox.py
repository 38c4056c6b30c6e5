"""The counter-based generator Philox4x64-10, and normal numbers from its words: the same bits on every device.

A block of four words of 64 bits is a function of a key and of the number of the block. So a device computes any part of
a stream by itself, from integer operations of torch that are the same everywhere. Normal numbers take additions,
products, quotients and square roots of float64 alone, one operation at a time: IEEE 754 fixes the result of each.
A logarithm or a cosine of torch's would differ between devices by a rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int]

WORDS = 4  # of a block
ROUNDS = 10
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B  # what a round adds to the key

HALF = 2**32 - 1
FULL = 2**64 - 1
# As the bits of a float64: 1, 2^52 and 3 2^51, and 2^32 sqrt(1/2).
ONE, UNITS, SIGNED_UNITS = 0x3FF << 52, 0x433 << 52, 0x867 << 51
ROOT_HALF = 0x41E6A09E667F3BCD

# Polynomials of least relative error (Remez), lowest power first, each within 2e-16 where it is used.
# 2 atanh(s) / s in s^2, for s up to (sqrt 2 - 1) / (sqrt 2 + 1).
TWICE_ATANH = (
    2.0000000000000004, 0.6666666666655223, 0.400000000620163, 0.2857141598112638, 0.2222343717444317,
    0.18121854943489604, 0.1683856145556722,
)  # fmt: skip
# sin(pi/2 y) / y and cos(pi/2 y) in y^2, for y up to 1/2.
SINE = (
    1.5707963267948966, -0.6459640975062443, 0.07969262624603957, -0.004681754132282454,
    0.00016044115029189453, -3.5986417551299964e-06, 5.633721075556274e-08,
)  # fmt: skip
COSINE = (
    0.9999999999999999, -1.2337005501361489, 0.25366950789975307, -0.020863480733058038,
    0.0009192599355754267, -2.5200084118976642e-05, 4.654617405948912e-07,
)  # fmt: skip
LOG_2 = 0.6931471805599453


def key_of(entropy: list[int]) -> Key:
    """The key of the stream that whole numbers, none of them negative, name: that of NumPy's ``SeedSequence``."""
    first, second = np.random.SeedSequence(entropy).generate_state(2, np.uint64).tolist()
    return first, second


def words(key: Key, first: int, last: int, device: torch.device) -> Tensor:
    """Words of the blocks from ``first`` up to ``last``, ``(4 (last - first),)``, as int64: NumPy's ``random_raw``."""
    if device.type == "cpu":  # the same words from NumPy's C, ten times as fast as by operations of torch
        raw = np.random.Philox(counter=first, key=np.array(key, np.uint64)).random_raw(WORDS * (last - first))
        return torch.from_numpy(raw.view(np.int64))
    return computed_words(key, first, last, device)


def computed_words(key: Key, first: int, last: int, device: torch.device) -> Tensor:
    """:func:`words` by operations of torch: about 400 of the size of the blocks, and no transfer."""
    # NumPy counts before it draws: block 0 has the counter 1. The other three words of the counter are 0.
    x: tuple[Any, ...] = (torch.arange(first + 1, last + 1, device=device), 0, 0, 0)
    for i in range(ROUNDS):
        bumped = [_signed(k + i * step) for k, step in zip(key, STEPS, strict=True)]
        (high0, low0), (high1, low1) = _product(x[0], MULTIPLIERS[0]), _product(x[2], MULTIPLIERS[1])
        x = high1 ^ x[1] ^ bumped[0], low1, high0 ^ x[3] ^ bumped[1], low0
    return torch.stack(x, 1).flatten()


def signs(words: Tensor) -> Tensor:
    """+1 or -1 for every bit, ``(64 words,)``, as int8: byte by byte, the highest bit of a byte first."""
    places = torch.arange(7, -1, -1, device=words.device, dtype=torch.uint8)
    bits = words.view(torch.uint8)[:, None] >> places & 1
    return bits.view(torch.int8).mul_(2).sub_(1).flatten()


def uniforms(words: Tensor) -> Tensor:
    """A number in [0, 1) from every word, as float64: its upper 53 bits, as NumPy's ``random`` has them."""
    return (words >> 11).bitwise_and_(2**53 - 1).to(torch.float64).mul_(2.0**-53)


def normals(words: Tensor) -> Tensor:
    """Two independent normal numbers from every word, ``(2 words,)``, in float64: Box and Muller (1958).

    The low half of a word is the radius: none is above 6.8, and the 32 bits are never zero in the logarithm. The high
    half is the angle: 30 bits within a quadrant, and two signs.
    """
    # A whole number becomes a float64 by its bits: below 2^52 it counts the units of [2^52, 2^53). This is exact, and
    # takes half the time of a conversion.
    u = (words & HALF).bitwise_or_(UNITS).view(torch.float64).sub_(2.0**52 - 0.5)
    radius = _minus_log(u).sqrt_()
    # 30 bits as those of a number in [1, 2), less 3/2: y in (-1/2, 1/2). The angle is pi/4 + pi/2 y. Its cosine and
    # sine are the difference and the sum of those of pi/2 y, times sqrt(1/2), which the radius takes: it is the root
    # of -log u, not of -2 log u.
    y = (words >> 10).bitwise_and_((2**30 - 1) << 22).bitwise_or_(ONE).view(torch.float64).sub_(1.5 - 2.0**-31)
    square = y * y
    sine, cosine = _polynomial(square, SINE).mul_(y), _polynomial(square, COSINE)
    pair = torch.empty(len(words), 2, dtype=torch.float64, device=words.device)
    first, second = (cosine - sine).mul_(radius), cosine.add_(sine).mul_(radius)  # both positive
    torch.copysign(first, words.view(torch.float64), out=pair[:, 0])
    torch.copysign(second, (words << 1).view(torch.float64), out=pair[:, 1])
    return pair.flatten()


def _minus_log(x: Tensor) -> Tensor:
    """-log(x / 2^32) for x between 0 and 2^32, in float64."""
    # x = 2^k 2^32 m with m in [sqrt(1/2), sqrt 2), and log m = 2 atanh((m - 1) / (m + 1)). Where x / 2^32 is near 1, k
    # is 0, so that nothing cancels. What is called m here has the factor 2^32.
    bits = x.view(torch.int64)
    k = (bits - ROOT_HALF).bitwise_right_shift_(52)
    m = (bits - (k << 52)).view(torch.float64)
    s = (2.0**32 - m).div_(m.add_(2.0**32))
    k = k.add_(SIGNED_UNITS).view(torch.float64).sub_(1.5 * 2.0**52)
    return _polynomial(s * s, TWICE_ATANH).mul_(s).add_(k.mul_(-LOG_2))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    *others, last = coefficients
    value = x * last
    for c in reversed(others[1:]):
        value.add_(c).mul_(x)
    return value.add_(others[0])


def _product(x: Tensor | int, factor: int) -> tuple[Tensor | int, Tensor | int]:
    """The high and the low word of the product of 128 bits of words without a sign."""
    if isinstance(x, int):
        whole = (x & FULL) * factor
        return _signed(whole >> 64), _signed(whole)
    small, large = factor & HALF, factor >> 32
    low, high = x & HALF, _upper(x)
    # Products of halves, each below 2^64 with the carry that it takes.
    carried = (high * small).add_(_upper(low * small))
    middle = low.mul_(large).add_(carried & HALF)
    return high.mul_(large).add_(_upper(carried)).add_(_upper(middle)), x * _signed(factor)


def _upper(x: Tensor) -> Tensor:
    return (x >> 32).bitwise_and_(HALF)  # the shift alone keeps the sign


def _signed(word: int) -> int:
    """The word as int64 has it: torch has no arithmetic on words without a sign."""
    word &= FULL
    return word - 2**64 if word >> 63 else word
