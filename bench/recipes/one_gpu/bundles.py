"""A folder as files of bounded size with a checksum, for machines that take or give back only small files."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

from beagle_sd.files import whole, write_json


def pack(source: Path, folder: Path, name: str, part_bytes: int) -> list[Path]:
    """Write `source`'s files into folder/NAME.part0, NAME.part1, ... of equal size, at most part_bytes, and NAME.json.

    Returns the paths written. Parts of an earlier pack of that name are removed first.
    """
    if part_bytes < 1:
        raise ValueError(f"part_bytes is {part_bytes}; allowed: at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    for old in folder.glob(f"{name}.part*"):
        old.unlink()
    archive = folder / f".{name}.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            tar.add(path, path.relative_to(source))
    total, digest = archive.stat().st_size, hashlib.sha256()
    count = -(-total // part_bytes)
    parts = [folder / f"{name}.part{number}" for number in range(count)]
    with archive.open("rb") as file:
        for part in parts:
            data = file.read(-(-total // count))
            digest.update(data)
            part.write_bytes(data)
    archive.unlink()
    write_json(folder / f"{name}.json", {"parts": count, "bytes": total, "sha256": digest.hexdigest()})
    return [*parts, folder / f"{name}.json"]


def unpack(folder: Path, name: str, out: Path) -> Path:
    """Join the parts in `folder`, check them, and make the folder `out` of them, whole or not at all.

    FileNotFoundError names the parts that are not there, ValueError says where the checksum differs.
    """
    head = folder / f"{name}.json"
    if not head.is_file():
        raise FileNotFoundError(f"{head} is not there; it says of how many parts {name} is")
    about = json.loads(head.read_text(encoding="utf-8"))
    parts = [folder / f"{name}.part{number}" for number in range(about["parts"])]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} of {name}'s {about['parts']} parts")
    with whole(out) as partial:
        partial.mkdir()
        archive, digest = partial / ".tar", hashlib.sha256()
        with archive.open("wb") as file:
            for part in parts:
                data = part.read_bytes()
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != about["sha256"]:
            raise ValueError(
                f"{name} in {folder} has {archive.stat().st_size} bytes of {about['bytes']} and another checksum than "
                f"{head.name} says; copy its parts again"
            )
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        archive.unlink()
    return out
