"""Randomness as a function of a key: (seed, stream name, position).

Every draw of the program comes from here, so neither the number of ranks or workers, nor the batch size, nor a resume
changes one. The generator is Philox4x64-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"):
the key is a digest of seed and stream, the counter holds the position.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key_of(seed: int, stream: str) -> np.ndarray:
    """The 128-bit Philox key of a stream, as two uint64 words."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """A generator for one position of one stream. Positions never overlap: each owns 2**128 counter values."""
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key_of(seed, stream), counter=counter))


def words_of(seed: int, stream: str) -> tuple[int, int]:
    """Two words of 32 bits, for who draws by a hash of his own: a twentieth of the time of a generator."""
    first, second = key_of(seed, stream).view(np.uint32)[:2].tolist()
    return first, second


def seed_of(seed: int, stream: str, position: int = 0) -> int:
    """A 63-bit integer for generators of other libraries."""
    return int(generator(seed, stream, position).integers(0, 2**63 - 1))
