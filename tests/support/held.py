"""The memory that results of PyTorch's operators hold. What these need within themselves is not seen."""

import weakref
from typing import Any

from torch import Tensor, float64
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Bytes of the tensors made while it is entered, at most at one time, and the numbers of the largest in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest_float64 = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.dtype == float64:
                self.largest_float64 = max(self.largest_float64, tensor.numel())
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return out

    def _let_go(self, storage: int, nbytes: int) -> None:
        self._known.discard(storage)
        self._now -= nbytes
