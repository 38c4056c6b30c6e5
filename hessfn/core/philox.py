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
SIGN = -(2**63)

# Polynomials of least relative error (Remez), lowest power first, each within 2e-16 where it is used.
# 2 atanh(s) / s in s^2, for s up to (sqrt 2 - 1) / (sqrt 2 + 1).
TWICE_ATANH = (
    2.0000000000000004, 0.6666666666655223, 0.400000000620163, 0.2857141598112638, 0.2222343717444317,
    0.18121854943489604, 0.1683856145556722,
)  # fmt: skip
# sin(pi/4 y) / y and cos(pi/4 y) in y^2, for y up to 1.
SINE = (
    0.7853981633974483, -0.08074551218828054, 0.0024903945701887364, -3.657620415845667e-05, 3.133616216638565e-07,
    -1.7571492944970685e-09, 6.8771009223099044e-12,
)  # fmt: skip
COSINE = (
    0.9999999999999999, -0.3084251375340372, 0.015854344243734567, -0.00032599188645403185, 3.5908591233415104e-06,
    -2.4609457147438127e-08, 1.1363812026242461e-10,
)  # fmt: skip
LOG_2 = 0.6931471805599453
ROOT_HALF = 0x41E6A09E667F3BCD  # 2^32 sqrt(1/2), as the bits of a float64


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


def normals(words: Tensor) -> Tensor:
    """Two independent normal numbers from every word, ``(2 words,)``, in float64: Box and Muller (1958).

    The low half of a word is the radius: none is above 6.8, and the 32 bits are never zero in the logarithm. The high
    half is the angle: 30 bits within a quadrant, and two signs.
    """
    radius = _minus_log((words & HALF).double().add_(0.5)).sqrt_()
    # The angle is pi/4 (1 + y). Its sine and cosine are sums and differences of those of pi/4 y, times sqrt(1/2), which
    # the radius takes: it is the root of -log u, not of -2 log u.
    y = (words >> 32).bitwise_and_(2**30 - 1).double().add_(0.5 - 2.0**29).mul_(2.0**-29)
    square = y * y
    sine, cosine = _polynomial(square, SINE).mul_(y), _polynomial(square, COSINE)
    pair = torch.empty(len(words), 2, dtype=torch.float64, device=words.device)
    for column, value, bits in ((0, cosine - sine, words & SIGN), (1, cosine.add_(sine), (words << 1) & SIGN)):
        pair[:, column] = value.mul_(radius).view(torch.int64).bitwise_xor_(bits).view(torch.float64)
    return pair.flatten()


def _minus_log(x: Tensor) -> Tensor:
    """-log(x / 2^32) for x between 0 and 2^32."""
    # x = 2^k 2^32 m with m in [sqrt(1/2), sqrt 2), and log m = 2 atanh((m - 1) / (m + 1)). Where x / 2^32 is near 1, k
    # is 0, so that nothing cancels. What is called m here has the factor 2^32.
    bits = x.view(torch.int64)
    k = (bits - ROOT_HALF).bitwise_right_shift_(52)
    m = (bits - (k << 52)).view(torch.float64)
    s = (2.0**32 - m).div_(m.add_(2.0**32))
    return _polynomial(s * s, TWICE_ATANH).mul_(s).add_(k.double().mul_(-LOG_2))


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
