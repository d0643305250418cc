"""A device on a machine that has none: tensors say that they are on `meta` and hold their values on the CPU.

What CUDA refuses is refused: an operation on a tensor of the device and one of the CPU (unless that is a scalar). So
code that makes a tensor on the wrong device fails here, too, and the rest computes what it computes on the CPU.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from tests.problem import replaced

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Pretended(torch.Tensor):
    is_meta = False  # what is asked of it is answered by values

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, values):
        self.values_held = values

    def __repr__(self):
        return f"Pretended({self.values_held})"

    def tolist(self):
        return held(self).tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        return _computed(function, types, arguments, named or {})


def moved(values):
    """A leaf on the device with the values of a tensor of the CPU."""
    return Pretended(values.detach().clone()).requires_grad_(values.requires_grad)


def held(tensor):
    """Its values, on the CPU."""
    return tensor.detach().values_held if isinstance(tensor, Pretended) else tensor.detach()


@contextlib.contextmanager
def pretending():
    """What is made on the device within the block is such a tensor."""
    made = torch.tensor  # knows `meta` well enough to forget the values
    there = lambda *given, device=None, **named: made(*given, **named).to(device or "cpu")  # noqa: E731
    with _Pretending(), replaced(torch, "tensor", there):
        yield


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return _computed(function, types, arguments, named or {})


def _computed(function, types, arguments, named):
    given = [x for x in tree_flatten((arguments, named))[0] if isinstance(x, torch.Tensor)]
    there = [isinstance(x, Pretended) for x in given]
    if any(there) and function not in _MOVES:
        strays = [x for x, is_there in zip(given, there, strict=True) if not is_there and x.dim()]
        assert not strays, f"{function}: a tensor of the CPU ({list(strays[0].shape)}) meets the device"
    asked = named.get("device")
    on_device = any(there) if asked is None else asked.type == DEVICE.type
    plain, plainly = tree_map_only(Pretended, lambda x: x.values_held, (arguments, named))
    if asked is not None:
        plainly["device"] = torch.device("cpu")
    found = function(*plain, **plainly)
    if function is torch.ops.aten.copy_.default:
        return arguments[0]
    if not on_device:
        return found
    wrapped = tree_map_only(torch.Tensor, Pretended, found)
    return return_and_correct_aliasing(function, arguments, named, wrapped)
