"""What stands beside a saved draft, so that transformers decodes with it given the draft's name alone."""

from __future__ import annotations

import uuid
from pathlib import Path

from beagle_sd.files import name_in_the_end

_MODULE = Path("custom_generate", "generate.py")
_SOURCE = '''"""target.generate(..., custom_generate=NAME, trust_remote_code=True): decodes with the draft NAME.

transformers runs a copy of this file, which finds the draft by what stands here, or by the name it has on a hub.
"""

try:
    from beagle_sd import generate_saved
except ImportError as error:
    raise ImportError('this draft needs the package beagle_sd: pip install "beagle-kernels[sd]"') from error

FOLDER = {folder!r}
SAVED = {saved!r}


def generate(model, **arguments):
    return generate_saved(model, __name__, FOLDER, SAVED, **arguments)
'''


def write_custom_generate(folder: str | Path) -> None:
    """Write `custom_generate` into the folder of a draft that was just saved."""
    folder = Path(folder)
    path = folder / _MODULE
    path.parent.mkdir(exist_ok=True)
    named = name_in_the_end(folder.absolute())
    path.write_text(_SOURCE.format(folder=str(named), saved=uuid.uuid4().hex), encoding="utf-8")


def saved_draft(module: str, folder: str, saved: str) -> tuple[str, str | None]:
    """The draft that a copy of the file, imported as `module`, belongs to: its folder or its name on a hub, and there
    its revision.

    ValueError where the folder it was saved as is gone, or holds another draft by now.
    """
    names = [_unmangled(part) for part in module.split(".")[1:-2]]
    if len(names) == 3:  # transformers_modules.USER.NAME.COMMIT.custom_generate.generate
        return f"{names[0]}/{names[1]}", names[2]
    for place in (Path(folder), Path(names[0])):
        if (place / _MODULE).is_file() and saved in (place / _MODULE).read_text(encoding="utf-8"):
            return str(place), None
    raise ValueError(
        f"this draft was saved as {folder}, which is gone or holds another by now; "
        "allowed: its folder in the call of generate, as draft='FOLDER'"
    )


def _unmangled(name: str) -> str:
    """A part of a name as it was before transformers made a Python name of it."""
    plain = name.replace("_hyphen_", "-").replace("_dot_", ".")
    return plain[1:] if plain[:1] == "_" and plain[1:2].isdigit() else plain
