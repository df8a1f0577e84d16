"""Pinterest in the form of He et al. 2017 (Geng et al. 2015; paper section 4.3)."""

from pathlib import Path

from lawn.data.he2017 import he2017
from lawn.data.interactions import Interactions

PUBLISHED = {"users": 55_187, "items": 9_916, "ratings": 1_500_809}


def pinterest(root: Path, split: str, *, seed: int, negatives: int, candidates: int, prefix: str) -> Interactions:
    """Read the three files `root`/PREFIX/PREFIX.*; those of pinterest-20 are downloaded if they are missing."""
    return he2017(root, prefix, split, seed=seed, negatives=negatives, candidates=candidates, published=PUBLISHED)
