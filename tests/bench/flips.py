"""Every changed byte of a release must be found: bits are flipped at random, misses counted.

python tests/bench/flips.py RELEASE --key PUBLIC.pem --n 1000
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from hbxt_compress.errors import HbxtError
from hbxt_compress.verify import open_release

__all__ = ["missed"]


def missed(folder: Path, n: int, *, key: Path | None, seed: int = 0) -> Iterator[str]:
    """`path, byte, bit` of each of n flips that `open_release` does not find.

    Every file is hit as often as any other, whatever its size. The folder is as before afterwards.
    """
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    for i in range(n):
        path = files[i % len(files)]
        before = path.read_bytes()
        place, bit = rng.randrange(len(before)), rng.randrange(8)
        changed = bytearray(before)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        try:
            open_release(folder, by=key)
        except HbxtError:
            continue
        else:
            yield f"{path.relative_to(folder)}, byte {place}, bit {bit}"
        finally:
            path.write_bytes(before)


def main() -> None:
    """Prints what was missed; exit code 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    open_release(asked.release, by=asked.key)
    found = list(missed(asked.release, asked.n, key=asked.key, seed=asked.seed))
    for one in found:
        sys.stdout.write(f"missed: {one}\n")
    sys.stdout.write(f"{asked.n - len(found)} of {asked.n} flips found\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
