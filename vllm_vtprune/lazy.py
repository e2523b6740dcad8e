"""torch, loaded when it is first used: a policy is validated without it, in the files that compute on tensors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:
    Tensor = Any  # for annotations alone

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            value = getattr(torch, name)
            setattr(self, name, value)  # so that this is not asked again
            return value

    torch = _Torch()
