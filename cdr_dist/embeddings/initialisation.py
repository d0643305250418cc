"""Initial values as a pure function of (seed, name, global row): equal on any number of workers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cdr_dist.data.hashing import key, mix

_BLOCK_VALUES = 1 << 22


def normal_rows(seed: int, name: str, first_row: int, rows: int, width: int, std: float) -> Tensor:
    """Rows first_row .. first_row + rows - 1 of a table [any, width] of N(0, std^2), float32 (Box-Muller)."""
    out = np.empty((rows, width), dtype=np.float32)
    start, pairs = key("init", seed, name), (width + 1) // 2
    step = max(1, _BLOCK_VALUES // max(width, 1))
    for lo in range(0, rows, step):
        hi = min(lo + step, rows)
        bits = mix(start, np.arange(first_row + lo, first_row + hi)[:, None], np.arange(pairs)[None, :])
        # Two 32-bit halves, each mapped into (0, 1), make two independent normals.
        u = ((bits >> np.uint64(32)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
        v = ((bits & np.uint64(0xFFFFFFFF)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
        radius = np.sqrt(-2.0 * np.log(np.minimum(u, np.float32(1 - 2**-24)))) * np.float32(std)
        angle = v * np.float32(2.0 * math.pi)
        out[lo:hi, 0::2] = radius * np.cos(angle)
        out[lo:hi, 1::2] = (radius * np.sin(angle))[:, : width // 2]
    return torch.from_numpy(out)


@torch.no_grad()
def initialise_dense(module: torch.nn.Module, seed: int, prefix: str = "") -> None:
    """Sets every dense parameter from (seed, name): matrices N(0, 2 / fan_in) (He et al. 2015), vectors to 0.

    What a constructor filled with one constant stays: a norm's weights of 1, a layer that starts at 0. A module may
    give other values in a method `initial_values() -> dict[parameter name, Tensor]`, which win.
    """
    own = {
        f"{name}.{key_}" if name else key_: value
        for name, child in module.named_modules()
        if hasattr(child, "initial_values")
        for key_, value in child.initial_values().items()
    }
    for name, parameter in module.named_parameters():
        if name in own:
            parameter.copy_(own[name])
        elif parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            continue
        elif parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            values = normal_rows(seed, prefix + name, 0, parameter.shape[0], fan_in, math.sqrt(2.0 / fan_in))
            parameter.copy_(values.view_as(parameter))
        else:
            parameter.zero_()
