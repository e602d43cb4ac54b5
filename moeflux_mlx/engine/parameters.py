"""The parameters of a layer as the weights of Ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..errors import ModelError
from ..experts.weights import OWN_FORM, Quantization, Weight, has_values
from .graph.op import JointRows, WeightRef
from .ops.functions import dequantize, to_host

# The parts of a quantised ``Weight``, and their names among a module's parameters.
KEYS = {"w": "weight", "scales": "scales", "biases": "biases"}


class Watch:
    """Detects that a parameter or a submodule of some modules was replaced."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(modules)
        self.seen = self._values()

    def holds(self) -> bool:
        """Return whether every value is still the same object."""
        values = self._values()
        return len(values) == len(self.seen) and all(map(is_, values, self.seen))

    def arrays_beside(self, known: Iterable[Any]) -> list[mx.array]:
        """Return the arrays that are not among ``known``."""
        ids = set(map(id, known))
        arrays = (value for value in self.seen if isinstance(value, mx.array))
        return [array for array in arrays if id(array) not in ids]

    def _values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._modules)))


_SIGNATURES: dict[tuple[WeightRef, ...], int] = {}
# Never gives a number twice, whichever threads load models.
_NUMBERS = itertools.count()


class LayerWeights:
    """The weights below one module by path, as references and as arrays.

    The next use notices parameters that were replaced (``model.update``, a dtype
    change), but not values changed in place (``weight[0] = 1``).

    Args:
        skip: leave out parameters with this name in their path.
        unpack: keep quantised matrices dense, in float32, on the host.
        joined: sequences of paths. If the matrices of one are stored alike, they
            become one, and the parameters become views of its rows. A module that
            trains is left alone.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        skip: str = "",
        unpack: bool = False,
        joined: Sequence[Sequence[str]] = (),
    ):
        self._module, self._skip, self._unpack = module, skip, unpack
        self._joined = joined
        self._joints: dict[str, Weight] = {}
        self._watch: Watch | None = None
        self._trains = False
        self._stored: dict[str, Weight] = {}
        self._bound: dict[bool, dict[str, Weight]] = {}
        self.refs: dict[str, WeightRef] = {}
        # Modules with the same graphs have the same signature.
        self.signature = -1

    def bind(self, dtype: mx.Dtype, *, host: bool = False) -> Mapping[str, Weight]:
        """Return weights by path, ready for activations of type ``dtype``.

        Args:
            host: return NumPy arrays, for references that run on the host.
        """
        self.refresh()
        if host not in self._bound:
            prepare = self._for_host if host else self._for_device
            stored = self._stored if host else {**self._stored, **self._joints}
            self._bound[host] = {
                name: prepare(weight, dtype) for name, weight in stored.items()
            }
            # Other threads could not evaluate a lazy array of this one.
            bound = self._bound[host].values()
            has_values(*(x for w in bound for x in w.arrays))
        return self._bound[host]

    def refresh(self) -> None:
        """Collect the weights again if a parameter of the module was replaced."""
        same_mode = self._trains == self._module.training
        if self._watch is not None and same_mode and self._watch.holds():
            return
        self._collect()

    def _collect(self) -> None:
        modules = []
        self._stored, self._bound = {}, {}
        self._trains = self._module.training
        for path, module in self._module.named_modules():
            if self._skip and self._skip in path.split("."):
                continue
            modules.append(module)
            self._collect_module(path, module)
        places = self._join()
        self._watch = Watch(modules)
        self.refs = {
            name: WeightRef.of(name, weight, places.get(name))
            for name, weight in self._stored.items()
        }
        refs = tuple(self.refs.values())
        self.signature = _SIGNATURES.setdefault(refs, next(_NUMBERS))

    def _join(self) -> dict[str, JointRows]:
        """Join matrices; return the rows of each in its joint matrix, by path."""
        places: dict[str, JointRows] = {}
        self._joints = {}
        if self._trains:
            return places
        modules = dict(self._module.named_modules())
        for paths in self._joined:
            members = [self._stored[path] for path in paths if path in self._stored]
            if not _joinable(members):
                continue
            name, first = "+".join(paths), 0
            quantization = members[0].quantization
            # A dense matrix has no scales and biases.
            arrays: dict[str, Any] = {
                part: mx.concatenate([getattr(member, part) for member in members])
                for part in (KEYS if quantization is not None else ("w",))
            }
            joint = Weight(**arrays, quantization=quantization)
            self._joints[name] = joint
            for path, weight in zip(paths, members, strict=True):
                n = weight.w.shape[0]
                # Once evaluated, the rows are views of the joint matrix.
                rows = {part: x[first : first + n] for part, x in arrays.items()}
                mx.eval(rows)
                for part, array in rows.items():
                    modules[path][KEYS[part]] = array
                self._stored[path] = Weight(**rows, quantization=quantization)
                places[path] = JointRows(name, first, joint.w.shape[0])
                first += n
            self._join_biases(name, paths, places)
        return places

    def _join_biases(
        self, name: str, paths: Sequence[str], places: dict[str, JointRows]
    ) -> None:
        """Join the biases of a joint matrix; a missing one becomes zeros."""
        found = {path: self._stored.get(f"{path}.bias") for path in paths}
        dtypes = [bias.w.dtype for bias in found.values() if bias is not None]
        if not dtypes:
            return
        parts = []
        for path in filter(places.__contains__, paths):
            n, bias = self._stored[path].w.shape[0], found[path]
            parts.append(mx.zeros(n, dtypes[0]) if bias is None else bias.w)
            places[f"{path}.bias"] = replace(places[path], name=f"{name}.bias")
        self._joints[f"{name}.bias"] = Weight(mx.concatenate(parts))

    def _collect_module(self, path: str, module: nn.Module) -> None:
        arrays = {k: v for k, v in module.items() if isinstance(v, mx.array)}
        quantization = None
        if "global_scale" in arrays:
            raise ModelError(
                f"[weights] {path}.global_scale: expected none beside scales; quantise "
                "without a global scale"
            )
        if "scales" in arrays:
            mode = getattr(module, "mode", "affine")
            quantization = Quantization.of(module.bits, module.group_size, mode)
        for key, array in arrays.items():
            if key in ("scales", "biases"):
                continue
            name = path if key == "weight" else f"{path}.{key}".lstrip(".")
            if key == "weight" and quantization:
                weight = Weight(
                    array, arrays["scales"], arrays.get("biases"), quantization
                )
            else:
                weight = Weight(array)
            self._stored[name] = weight

    def _for_host(self, weight: Weight, dtype: mx.Dtype) -> Weight:
        if weight.quantization is None:
            return Weight(to_host(weight.w.astype(dtype)))
        if not self._unpack:
            return self._for_device(weight, dtype)
        return Weight(dequantize(weight.on_host))

    def _for_device(self, weight: Weight, dtype: mx.Dtype) -> Weight:
        if not device.on_cpu():
            return weight
        if weight.quantization is None:
            return Weight(weight.w.astype(dtype))
        if weight.quantization.mode != "affine" or weight.scales is None:
            return weight
        biases = None if weight.biases is None else weight.biases.astype(dtype)
        return Weight(
            weight.w, weight.scales.astype(dtype), biases, weight.quantization
        )


def _joinable(members: Sequence[Weight]) -> bool:
    """Return whether matrices can be joined: stored alike, with values."""
    if len(members) < 2 or len({_form(member) for member in members}) > 1:
        return False
    quantised = members[0].quantization is not None
    whole = members[0].biases is not None or not quantised
    return whole and has_values(*(w.w for w in members))


def _form(matrix: Weight) -> tuple[Any, ...]:
    """Return how a matrix is stored, and the length of its rows."""
    like = matrix.w if matrix.quantization is None else matrix.scales
    return matrix.quantization, like.dtype, matrix.w.shape[1:], matrix.biases is None


def dense_bytes(module: nn.Module) -> int:
    """Return the float32 bytes of a quantised module's matrix; 0 for other modules."""
    if "scales" not in module:
        return 0
    bits = module.bits or OWN_FORM[getattr(module, "mode", "affine")][0]
    return 4 * int(module["weight"].size) * 32 // bits


def held_bytes(module: nn.Module, *, skip: str = "", unpack: bool = False) -> int:
    """Return the bytes of all parameters below a module, with the copies on a CPU.

    Args:
        skip: leave out parameters with this name in their path.
        unpack: as for ``LayerWeights``.
    """
    total = 0
    for path, child in module.named_modules():
        if not (skip and skip in path.split(".")):
            parameters = {k: v for k, v in child.items() if isinstance(v, mx.array)}
            total += sum(array.nbytes for array in parameters.values())
            if device.on_cpu():
                total += _copied_bytes(child, parameters, unpack)
    return total


def _copied_bytes(
    module: nn.Module, parameters: Mapping[str, mx.array], unpack: bool
) -> int:
    if unpack and "scales" in parameters:
        return dense_bytes(module)
    short = (mx.bfloat16, mx.float16)
    return sum(4 * a.size for a in parameters.values() if a.dtype in short)
