"""Trains the net of hessfn.problems.digits() and writes its weights, which come with the library.

    python tools/train_digits.py [FILE]

Without FILE it writes hessfn/data/digits.npz: one float32 array for each name of the state_dict, no pickled objects.
The same machine writes the same bytes; another one may differ in the last bits. So it is run again only when the net
or its training changes, and the numbers in tests/test_problems.py with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from hessfn.problems import train_digits

FILE = Path(__file__).parents[1] / "hessfn" / "data" / "digits.npz"


def main() -> None:
    torch.set_num_threads(1)
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    state = train_digits(seed=0, epochs=12).state_dict()
    np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    print(f"{file}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
