"""What a computation costs, operation by operation: floating-point operations, bytes moved, calls, memory at once.

Counted where torch dispatches its operators, so it holds for any code, on any device, also on `meta`, where nothing
is computed. Torch's own flop counter gives the formulas; those it lacks are added below: distances (`cdist`), the fused
attention of CPUs, the fast path of its transformer layers. They would count as nothing.
A multiplication and an addition are two operations; bytes are those of the arguments and of the results.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

MATMUL, CONVOLUTION, ATTENTION, MEMORY = KINDS = ("matmul", "convolution", "attention", "memory")
HALF, SINGLE, DOUBLE = "half", "single", "double"
_aten = torch.ops.aten


def _registered(names: Sequence[str]) -> list:
    """Operators of this torch among the names; versions differ in which they have."""
    return [getattr(_aten, name) for name in names if hasattr(_aten, name)]


def _distance_flop(x1: Sequence[int], x2: Sequence[int], *_: object, out_shape: object = None, **__: object) -> int:
    """Subtract, square, add for each pair of rows (..., P, M) and (..., R, M)."""
    pairs = x1[-2] * x2[-2]
    for size in torch.broadcast_shapes(x1[:-2], x2[:-2]):
        pairs *= size
    return 3 * pairs * x1[-1]


def _attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object,
                    out_shape: object = None, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _projected_attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], embed_dim: int,
                              *_: object, out_shape: object = None, **__: object) -> int:
    """Four projections (B, T, D) by (D, D), and two products of T by T by D."""
    batch, tokens = query[0], query[1]
    return 8 * batch * tokens * embed_dim ** 2 + 4 * batch * tokens ** 2 * embed_dim


def _encoder_layer_flop(tokens: Sequence[int], embed_dim: int, *others: object, out_shape: object = None,
                        **__: object) -> int:
    """Attention, then two layers between width D and the rows of the first one's weights."""
    hidden = others[12][0]
    return _projected_attention_flop(tokens, tokens, tokens, embed_dim) + 4 * tokens[0] * tokens[1] * embed_dim * hidden


ADDED = {
    "_euclidean_dist": _distance_flop, "_cdist_forward": _distance_flop,
    "_scaled_dot_product_flash_attention_for_cpu": _attention_flop,
    "scaled_dot_product_attention": _attention_flop,  # whole, where nothing asks for a gradient
    "_native_multi_head_attention": _projected_attention_flop,
    "_transformer_encoder_layer_fwd": _encoder_layer_flop,
}
for _name, _formula in ADDED.items():
    for _packet in _registered([_name]):
        if _packet not in flop_registry:
            register_flop_formula(_packet)(_formula)


# What is asked of numbers that are not there, on `meta`: every condition holds, every number is one, no place is found.
ANSWERS = {
    torch.ops.aten._local_scalar_dense.default: lambda x: True if x.dtype == torch.bool else 1,
    torch.ops.aten.nonzero.default: lambda x: x.new_empty((0, x.ndim), dtype=torch.long),
}


@dataclass(frozen=True)
class Cost:
    """Of all operators of one kind and precision. May be fractions: costs are scaled and fitted."""

    flop: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes, self.calls + other.calls)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.flop * factor, self.bytes * factor, self.calls * factor)

    __rmul__ = __mul__


Costs = Mapping[tuple[str, str], Cost]  # (kind, precision) -> cost


@dataclass(frozen=True)
class Counted:
    costs: Costs
    peak_bytes: int  # of the tensors made while counting and alive at once; arguments made before do not count


def count(work: Callable[[], object]) -> Counted:
    """Run `work` and count what it does; what it returns is dropped."""
    counter = _Counter()
    with counter:
        work()
    return Counted(dict(counter.costs), counter.peak)


def total(costs: Costs) -> Cost:
    """All kinds and precisions together."""
    return sum(costs.values(), Cost())


def scaled(costs: Costs, factor: float) -> Costs:
    return {key: factor * cost for key, cost in costs.items()}


class _Counter(TorchDispatchMode):
    """Adds up every operator that is dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[tuple[str, str], Cost] = {}
        self.alive, self.peak = 0, 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func in ANSWERS and args[0].is_meta:
            return ANSWERS[func](args[0])
        if func._overloadpacket not in flop_registry:
            with self:  # in inference mode composite operators arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        made = [t for t in _tensors(out) if not _is_view(func, t, given)]
        if written := made or _written(func, args, kwargs):
            key, cost = _kind(func, given), _cost(func, args, kwargs, out, given, written)
            key = (key, _precision(given or written))
            self.costs[key] = self.costs.get(key, Cost()) + cost
            self._keep_in_mind(made)
        return out

    def _keep_in_mind(self, made: list[Tensor]) -> None:
        """Count the memory of new tensors until their storage is gone."""
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage in self._known:
                continue
            self._known.add(storage)
            size = storage.nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.alive -= size


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(func: Callable, tensor: Tensor, given: list[Tensor]) -> bool:
    """True where the result is only another look at an argument: nothing was written."""
    writes = any(argument.alias_info is not None and argument.alias_info.is_write
                 for argument in func._schema.arguments)
    return not writes and any(tensor.untyped_storage() is other.untyped_storage() for other in given)


def _written(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that are written: what `_foreach_add_` and its like change, as they return nothing."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return _tensors([named[argument.name] for argument in func._schema.arguments
                     if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named])


def _kind(func: Callable, given: list[Tensor]) -> str:
    packet = func._overloadpacket
    if packet not in flop_registry:
        return MEMORY
    name = str(packet)
    if "conv" in name:
        return CONVOLUTION
    return ATTENTION if "attention" in name or "encoder_layer" in name else MATMUL


def _precision(tensors: list[Tensor]) -> str:
    """Of the widest floating-point tensor; whole numbers go with single precision."""
    sizes = [t.dtype.itemsize for t in tensors if t.dtype.is_floating_point]
    widest = max(sizes, default=4)
    return HALF if widest <= 2 else SINGLE if widest <= 4 else DOUBLE


def _cost(func: Callable, args: tuple, kwargs: dict, out: object, given: list[Tensor], made: list[Tensor]) -> Cost:
    formula = flop_registry.get(func._overloadpacket)
    flop = formula(*args, **kwargs, out_val=out) if formula else 0
    return Cost(float(flop), float(sum(t.numel() * t.dtype.itemsize for t in (*given, *made))), 1.0)
