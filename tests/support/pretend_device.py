"""A device that is none: tensors that say they are on it, and compute on the CPU.

What a GPU would be asked to do is seen without one: types and sizes of what lies on it, the times that the host waits
for it, and that no operator takes tensors of both. Its name is ``meta``, the only one beside ``cpu`` that every build
of PyTorch accepts.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
"""Operators whose result the host has to see: a number, or how many there are."""
TAKES_BOTH = {"_to_copy", "copy_", "index", "index_put_", "index_put", "_index_put_impl_"}


class OnDevice(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=NAME,
        )  # fmt: skip
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("only within PretendDevice")


class PretendDevice(TorchDispatchMode):
    """While it is entered, ``tensor.to(NAME)`` gives a tensor on the device.

    Attributes:
        waits: how often the host waited for the device.
        peak: bytes of the tensors on it, at most at one time. What an operator needs within itself is not seen.
        largest_float64: numbers of the largest float64 tensor on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.peak = self.largest_float64 = 0
        self._holders: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        from_device = any(isinstance(tensor, OnDevice) for tensor in tensors)
        if from_device and name not in TAKES_BOTH:
            here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim]
            assert not here, f"{name} of tensors on two devices"
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        to_device = from_device if asked is None else torch.device(asked).type == NAME
        self.waits += from_device and (name in WAITS or not to_device)
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if not to_device:
            return out
        if asked is not None and not from_device:
            out = out.clone()  # not the caller's memory
        known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnDevice)}

        def on_device(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else self.hold(leaf)

        return tree_map(on_device, out)

    def hold(self, inner: Tensor) -> Tensor:
        """``inner`` as a tensor on the device."""
        made = OnDevice(inner)
        storage = inner.untyped_storage()
        self._holders[storage.data_ptr()] += 1
        self._bytes[storage.data_ptr()] = storage.nbytes()
        weakref.finalize(made, self._let_go, storage.data_ptr())
        self.peak = max(self.peak, sum(self._bytes.values()))
        if inner.dtype == torch.float64:
            self.largest_float64 = max(self.largest_float64, inner.numel())
        return made

    def _let_go(self, pointer: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            del self._bytes[pointer]


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnDevice) else leaf
