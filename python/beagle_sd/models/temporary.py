"""A change to somebody else's model that lasts while any thread needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Kept = TypeVar("Kept")


class TemporaryChange(Generic[Model, Kept]):
    """As a context manager of a model: the first thread in it calls `make(model)`, whose result the last one out gives
    to `undo(model, result)`."""

    def __init__(self, make: Callable[[Model], Kept], undo: Callable[[Model, Kept], None]):
        self._make, self._undo = make, undo
        self._lock = threading.Lock()
        self._in_use: WeakKeyDictionary[Model, tuple[Kept, int]] = WeakKeyDictionary()

    @contextmanager
    def __call__(self, model: Model) -> Iterator[None]:
        with self._lock:
            kept, users = self._in_use[model] if model in self._in_use else (self._make(model), 0)
            self._in_use[model] = kept, users + 1
        try:
            yield
        finally:
            with self._lock:
                kept, users = self._in_use.pop(model)
                if users > 1:
                    self._in_use[model] = kept, users - 1
                else:
                    self._undo(model, kept)
