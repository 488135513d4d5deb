"""The compiled extension (csrc/bindings.cpp); `cuda` is there only where it was built with nvcc."""

from typing import Any

cpu: Any
cuda: Any
no_cuda: str
law_size: int
