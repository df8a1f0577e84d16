"""MovieLens (Harper & Konstan 2015; paper section 4.3)."""

from pathlib import Path
from typing import Any

from lawn.data.download import download, read_member
from lawn.data.he2017 import he2017
from lawn.data.interactions import Interactions
from lawn.data.ratings import count_warnings, leave_one_out, naming_file, read_ratings
from lawn.errors import DataError
from lawn.files import atomic

URL = "https://files.grouplens.org/datasets/movielens"
MD5 = {"ml-100k": "0e33842e24a9c977be4e0107933c0723", "ml-1m": "c4d9eecfca2ab87c1945afe126590906"}
HEADER = "userId,movieId,rating,timestamp"  # of ratings.csv
PUBLISHED = {
    "ml-100k": {"users": 943, "items": 1682, "ratings": 100_000},
    "ml-1m": {"users": 6040, "items": 3706, "ratings": 1_000_209},
}


def movielens100k(root: Path, split: str, *, seed: int, negatives: int, candidates: int) -> Interactions:
    """Read `root`/ml-100k/u.data; downloads it if it is missing."""
    return _official(
        root, "ml-100k", "u.data", "\t", split=split, seed=seed, negatives=negatives, candidates=candidates
    )


def movielens1m(
    root: Path, split: str, *, seed: int, negatives: int, candidates: int, prefix: str | None = None
) -> Interactions:
    """Read `root`/ml-1m/ratings.dat, or with `prefix` the three files of that name (ml-1m as released).

    Downloads missing files. The three files include the candidates, so all who use them rank the same ones.
    """
    options = {"seed": seed, "negatives": negatives, "candidates": candidates}
    if prefix is not None:
        return he2017(root, prefix, split, published=PUBLISHED["ml-1m"], **options)
    return _official(root, "ml-1m", "ratings.dat", "::", split=split, **options)


def movielens(root: Path, split: str, *, path: str, seed: int, negatives: int, candidates: int) -> Interactions:
    """Read `root`/`path`: u.data, ratings.dat or ratings.csv of any version, recognized by the separator.

    Ratings and times may have decimals. Counts are not compared with published ones, and nothing is downloaded.
    """
    file = root / path
    if not file.is_file():
        raise DataError(
            f"{file}: not there, or no file; dataset.path is a file of ratings below data_dir, such as "
            f"ml-latest-small/ratings.csv out of an archive from {URL}"
        )
    with file.open("rb") as opened:
        first = opened.readline(1000)
    separator = next((s for s in ("::", ",") if s.encode() in first), "\t")
    ratings = read_ratings(file, separator, HEADER if separator == "," else "", fractions=True)
    with naming_file(file):
        return leave_one_out(ratings, split=split, seed=seed, negatives=negatives, candidates=candidates, warnings=[])


def _official(root: Path, name: str, file: str, separator: str, **options: Any) -> Interactions:
    path = root / name / file
    if not path.exists():
        archive = path.with_name(f"{name}.zip")
        if not archive.exists():
            advice = f"put {archive.name} from there, or its {file}, into {path.parent}"
            download(f"{URL}/{archive.name}", archive, MD5[name], advice)
        content = read_member(archive, MD5[name], f"{name}/{file}")
        with atomic(path) as temporary:
            temporary.write_bytes(content)
    ratings = read_ratings(path, separator)
    with naming_file(path):
        return leave_one_out(ratings, warnings=count_warnings(name, PUBLISHED[name], ratings), **options)
