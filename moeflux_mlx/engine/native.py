"""The base of native model classes: mlx-lm's modules with calls made of graphs.

The files in ``models/`` describe the layers of each family.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..calls.module_call import backbone_of
from ..drafts import let_all_draft
from ..errors import ModelError
from ..experts.compute.switch import StreamedSwitch
from ..experts.files.layout import BIAS
from ..experts.files.modules import (
    RoutedBlock,
    projections_of,
    quantize_as_stored,
)
from ..memory.plan import Needs
from ..saving.guard import GuardsSaving, guard_saving, keep_whole, refuse_experts
from ..training import TrainsUncompiled
from .forward import Forward
from .graph.experts import GraphExperts
from .layer import GraphLayer, LayerForm
from .runtime import RunOptions, Runtime

guard_saving()
let_all_draft()


class GraphText(nn.Module):
    """The base of a text model's class: tokens ``[B, T]`` to logits."""

    forward: Forward

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Return logits ``[B, T, V]``."""
        return self.forward(inputs, cache, input_embeddings)


class GraphBackbone(nn.Module):
    """The base of a backbone's class: tokens to normalised hidden states."""

    forward: Forward

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Return rows ``[B, T, D]``."""
        return self.forward.rows(inputs, cache, input_embeddings)


class NativeModel(GuardsSaving, TrainsUncompiled):
    """The base of a model's class, placed before mlx-lm's own.

    Subclasses made by ``moeflux_mlx.load`` and packed directories set ``options``. By
    default all experts are ordinary parameters.
    """

    options: ClassVar[RunOptions] = RunOptions()

    def __init__(self, args: Any):
        super().__init__(args)  # type: ignore[call-arg]
        self.runtime = Runtime(self.options)
        self.__dict__.update(group=self.options.group, pipeline=False)

    def run_on_graphs(
        self, text: Any, forms: Iterable[LayerForm], path: str = ""
    ) -> None:
        """Run the calls of the text model on graphs.

        Args:
            text: mlx-lm's module, with its ``model`` of ``layers`` and its ``args``.
            forms: the form of each layer.
            path: the prefix of its parameters' names.

        Raises:
            ModelError: graphs cannot perform a layer, or its experts are not in the
                files.
        """
        forms = list(forms)
        for form, layer in zip(forms, text.model.layers, strict=True):
            _check_form(form, layer)
        backbone = backbone_of(text.model)
        _begin_with(GraphBackbone, text.model)
        if not isinstance(text, GraphText):
            _begin_with(GraphText, text)
        self._stream_experts(text, forms, path)
        text.forward = Forward(text, text.args, self.runtime, forms, backbone)
        text.model.forward = text.forward
        keep_whole(self)  # type: ignore[arg-type]

    def _stream_experts(self, text: Any, forms: list[LayerForm], path: str) -> None:
        """Replace routed blocks by modules that stream, if experts are in files."""
        if self.runtime.store is None:
            return
        routed = [i for i, form in enumerate(forms) if form.routed is not None]
        self.runtime.check_layers(routed)
        for index in routed:
            inner, name = forms[index].mlp.path, forms[index].routed_name
            block = text.model.layers[index][inner]
            where = f"{path}model.layers.{index}.{inner}.{name}"
            block[name] = self._streamed(text, block[name], index, where)

    def _streamed(
        self, text: Any, block: nn.Module, index: int, name: str
    ) -> StreamedSwitch:
        """Return the streaming module of a routed block, for calls without graphs."""
        runtime = self.runtime
        assert runtime.store is not None
        layout = runtime.store.layout(index)
        has_biases = any(BIAS in m for m in projections_of(block).values())
        if layout.is_biased != has_biases:
            wanted, got = ("biases", "none") if has_biases else ("no biases", "some")
            raise ModelError(
                f"[experts] {name}: expected {wanted} of its matrices but got {got}: "
                "use the model's own weights"
            )
        stored = zip(layout.projections, layout.quantization, strict=True)
        quantize_as_stored(block, dict(stored))

        def source() -> GraphExperts:
            runtime.open(text.forward.needs)
            assert runtime.streamer is not None
            return runtime.streamer.source(index)

        routed, exchange = RoutedBlock(name, block), runtime.together.exchange
        switch = StreamedSwitch(routed, source, runtime.alone, exchange=exchange)
        runtime.holders.add(switch.slot_block)
        # While it loads, mlx-lm quantises every module that the configuration names.
        switch.show_matrices(False)
        return switch

    def load_weights(self, *arguments: Any, **options: Any) -> Any:
        """Load parameters as mlx-lm does, then show the streamed matrices."""
        loaded = super().load_weights(*arguments, **options)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, StreamedSwitch):
                module.show_matrices(True)
        return loaded

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename weights as mlx-lm does, without those of streamed experts."""
        found: dict[str, mx.array]
        found = super().sanitize(  # type: ignore[misc]
            self.runtime.without_streamed(weights)
        )
        return found

    def update(  # type: ignore[override]
        self, parameters: Any, strict: bool = True
    ) -> Any:
        """Replace parameters.

        Raises:
            ModelError: some belong to streamed experts; nothing is replaced.
        """
        if self.runtime.store is not None:
            refuse_experts(dict(tree_flatten(parameters)), self.engine.routed_name)
        return super().update(parameters, strict)

    @property
    def engine(self) -> Forward:
        """The forward pass that runs the model's calls."""
        found: Forward = self.forward
        return found

    @property
    def streamer(self) -> Any:
        """The expert streamer; None if experts are parameters."""
        self.runtime.open(self.needs)
        return self.runtime.streamer

    @property
    def needs(self) -> Needs:
        """The memory that the model needs."""
        return self.engine.needs

    @property
    def graph_layers(self) -> list[GraphLayer]:
        """The decoder layers as graphs."""
        return self.engine.graph_layers()


def _begin_with(first: type, module: nn.Module) -> None:
    """Put a class before the class of mlx-lm's module."""
    module.__class__ = _beginning_with(first, type(module))


@functools.cache
def _beginning_with(first: type, stock: type) -> type:
    """Return mlx-lm's class with another one before it, under mlx-lm's name."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (first, stock), names)


def _check_form(form: LayerForm, layer: nn.Module) -> None:
    form.mixer.check(layer[form.mixer.path])
    routed = form.routed
    if routed is not None and (routed.n_experts < 1 or routed.k > routed.n_experts):
        raise ModelError(
            f"[config] num_experts_per_tok expected 1 to num_experts but got "
            f"{routed.k} of {routed.n_experts}"
        )
