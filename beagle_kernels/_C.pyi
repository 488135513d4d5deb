"""The compiled extension (csrc/bindings.cpp); `cuda` is there only where it was built with nvcc."""

from typing import Any

cpu: Any
cuda: Any
no_cuda: str
archs: str
instruction_set: str
instruction_sets: tuple[str, ...]
dtypes: dict[str, int]
exact: int
int8: int
law_size: int
max_nodes: int
chunk: int
max_k: int
max_rows: int
row_words: int
part_words: int

def use_instruction_set(name: str) -> None: ...
