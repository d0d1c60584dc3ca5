"""The adapters that can be named in a request."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.engine.errors import BadRequestError, ForbiddenPathError, NotFoundError
from worker.engine.lora import LoraWeights


@dataclass(frozen=True)
class ServedAdapter:
    """A loaded adapter; `path` is the text that the load call gave, so that a client can recognise it."""

    name: str
    path: str
    weights: LoraWeights
    created: int


class AdapterRegistry:
    """Name -> weights. Thread-safe; loading runs outside the lock, so that requests never wait for it."""

    def __init__(self, root: Path, read: Callable[[Path], LoraWeights], *, reserved: str) -> None:
        self._root = root.resolve()
        self._read = read
        self._reserved = reserved
        self._lock = threading.Condition()
        self._loading: set[str] = set()
        self._served: dict[str, ServedAdapter] = {}

    def load(self, name: str, path: str, created: int) -> None:
        """Read the directory `path` and serve it as `name`.

        Raises BadRequestError (name taken), ForbiddenPathError, NotFoundError or AdapterLoadError.
        """
        with self._lock:
            # A second call for a name that is just being loaded waits, as in vLLM, and then finds it taken or free.
            self._lock.wait_for(lambda: name not in self._loading)
            if name == self._reserved or name in self._served:
                raise BadRequestError(f"The lora adapter '{name}' has already been loaded.", param="lora_name")
            self._loading.add(name)
        try:
            weights = self._read(self._checked(path))
            with self._lock:
                self._served[name] = ServedAdapter(name, path, weights, created)
        finally:
            with self._lock:
                self._loading.discard(name)
                self._lock.notify_all()

    def unload(self, name: str) -> None:
        """Forget `name`; requests that are being answered keep the weights. Raises NotFoundError."""
        with self._lock:
            if self._served.pop(name, None) is None:
                raise NotFoundError(f"The lora adapter '{name}' cannot be found.", param="lora_name")

    def get(self, name: str) -> ServedAdapter | None:
        with self._lock:
            return self._served.get(name)

    def list(self) -> list[ServedAdapter]:
        with self._lock:
            return list(self._served.values())

    def _checked(self, path: str) -> Path:
        """The directory, links resolved, if it lies below the adapters root."""
        if "\0" in path:
            raise NotFoundError("No adapter found: the path has a zero byte in it.", param="lora_path")
        resolved = Path(path).resolve()
        if not resolved.is_relative_to(self._root):
            raise ForbiddenPathError("lora_path is outside the engine's adapters root.", param="lora_path")
        if not resolved.is_dir():
            raise NotFoundError("No adapter found: lora_path is not a directory.", param="lora_path")
        return resolved
