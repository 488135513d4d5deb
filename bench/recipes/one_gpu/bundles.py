"""A folder as files of bounded size with a checksum, for machines that take or give back only small files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path


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
    whole = folder / f".{name}.tar"
    with tarfile.open(whole, "w") as tar:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            tar.add(path, path.relative_to(source))
    total, digest = whole.stat().st_size, hashlib.sha256()
    count = -(-total // part_bytes)
    parts = [folder / f"{name}.part{number}" for number in range(count)]
    with whole.open("rb") as file:
        for part in parts:
            data = file.read(-(-total // count))
            digest.update(data)
            part.write_bytes(data)
    about = {"parts": count, "bytes": total, "sha256": digest.hexdigest()}
    whole.unlink()
    (folder / f"{name}.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
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
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    whole, digest = partial / ".tar", hashlib.sha256()
    with whole.open("wb") as file:
        for part in parts:
            data = part.read_bytes()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != about["sha256"]:
        size = whole.stat().st_size
        shutil.rmtree(partial)
        raise ValueError(
            f"{name} in {folder} has {size} bytes of {about['bytes']} and another checksum than "
            f"{head.name} says; copy its parts again"
        )
    with tarfile.open(whole) as tar:
        tar.extractall(partial, filter="data")
    whole.unlink()
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return out
