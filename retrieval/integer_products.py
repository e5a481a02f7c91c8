"""Matrix products of a transformer in 8-bit integers on the CPU: twice as fast as in 32-bit floats, or faster.

Weights are rounded once, each row of outputs with its own scale; inputs at every call, each row with its own scale.
The sums are exact integers, so a row's result does not depend on the rows beside it. Needs a processor with
VNNI instructions; without them torch would take a slow path, so layers are left as they are there.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from data.errors import expect

_LARGEST = 127  # of a signed byte, the same to both sides
_SMALLEST = 64  # outputs: below that a layer's product is no matter
_DEEPEST = 2**31 // _LARGEST**2  # inputs whose products are sure to fit into 32 bits


def supported() -> bool:
    """True if this processor multiplies bytes faster than floats."""
    for name in ("_is_vnni_supported", "_is_cpu_support_vnni"):  # the second is its name in torch 2.4
        known = getattr(torch.cpu, name, None)
        if known is not None:
            return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(known())
    return False


class IntegerLinear(nn.Module):
    """A linear layer with weights of one byte. For inference: it has no gradients."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        expect(layer.in_features <= _DEEPEST, "in_features", f"at most {_DEEPEST}", layer.in_features)
        weight, scale = _rounded(layer.weight.detach())
        self.register_buffer("weight", weight.t())  # (in, out), read along its columns
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) float32. Returns (..., out)."""
        rows, scale = _rounded(x.reshape(-1, x.shape[-1]))
        total = torch._int_mm(rows, self.weight)  # exact, int32
        return torch.addcmul(self.bias, total * scale, self.scale).view(*x.shape[:-1], -1)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as bytes in [-127, 127] and the value of one unit of each row: (R, D) int8 and (R, 1)."""
    scale = rows.abs().amax(1, keepdim=True).clamp_(min=1e-20) / _LARGEST
    return (rows / scale).round_().to(torch.int8), scale


def with_integer_products(model: nn.Module) -> nn.Module:
    """The same model; its larger linear layers are replaced in place."""
    for name, part in model.named_children():
        if isinstance(part, nn.Linear) and part.out_features >= _SMALLEST:
            setattr(model, name, IntegerLinear(part))
        else:
            with_integer_products(part)
    return model
