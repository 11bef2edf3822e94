"""`C3AExperts`: experts whose weights are stacked in parameters, with adapters for each in the grouped product."""

from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton._public import public
from c3a_triton.bases import mxfp4
from c3a_triton.bases.experts import Layout, base_forward, foreign_product, layout, spread
from c3a_triton.bases.probe import is_ordinary
from c3a_triton.bases.quantized import holds_values
from c3a_triton.bases.sharded import is_sharded, local
from c3a_triton.errors import BackendError, ConfigError, ShapeError
from c3a_triton.operator import routes as routing
from c3a_triton.operator.routed import c3a_routed, grouped_base
from c3a_triton.operator.routes import Routes

from .names import uncompiled
from .parts import SPREAD_LATE, Holder, Part

__all__ = ["C3AExperts", "C3AStacked"]


class C3AStacked(Part):
    """One projection of experts, W [n_experts, out, in], with adapters: y_s = x_s W_gᵀ + bias_g + Σ x_s ΔW_{a,g}ᵀ.

    Each row s belongs to one expert g. An adapter's `c3a_kernel` is [n_experts, out / b, in / b, b], and ΔW_{a,g} that
    of a linear layer with the g-th of them. Where the rows of gate and up follow one another, b has to divide each
    half; where they alternate (gpt-oss), blocks take them as they are stored, both in one block.

    Attributes:
        parameter: the name of W in the experts module.
        transposed: whether W is stored as [n_experts, in, out].
    """

    kind = "experts"
    rows_problem = "is sorted by expert"

    def is_spread(self) -> bool:
        """As `C3ALinear.is_spread`."""
        return spread(self.base_layer, self.parameter) is not None

    def _part_of(self, kernel: nn.Parameter) -> nn.Parameter:
        held = spread(self.base_layer, self.parameter)
        return kernel if held is None else held.of_kernel(kernel)

    def _kernel_on(self, name: str, device: torch.device | None = None) -> Tensor:
        kernel = super()._kernel_on(name, device)
        return self._here(kernel) if self.is_spread() else kernel  # FSDP2 shards others, and some of these once more

    def _here(self, kernel: Tensor) -> Tensor:
        """A kernel as this process computes with it: where a plan spreads the experts, its own part.

        The operator has the scale 1 / in_features of what it gets, and ΔW that of the whole.
        """
        if type(kernel) in (Tensor, nn.Parameter):
            return kernel
        part = local(kernel)
        share = part.shape[-2] * part.shape[-1] / self.in_features
        return part if share == 1 else part * share

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter, as `C3ALinear.get_delta_weight`; of experts that a plan spreads a DTensor, as W is one."""
        delta = super().get_delta_weight(adapter)
        if not self.is_spread():
            return delta
        weight: Any = self.weight
        return type(weight).from_local(delta, weight.device_mesh, weight.placements)

    def forward(self, x: Tensor, routes: Routes, *, gather: bool = False) -> Tensor:
        """The projection of rows that are sorted by expert.

        Args:
            x: [n_rows, in]; with `gather` the tokens, [n_tokens, in]. It is computed in W's dtype, and in its own where
                W is codes (FP8, MXFP4).
            routes: the experts of the rows.
            gather: row s is `x[routes.source[s]]`.

        Returns:
            [n_rows, out] in that dtype; rows without an expert are 0.

        Raises:
            ShapeError: sizes, dtypes or devices that do not fit, or rows of the batch have different adapters.
            AdapterStateError: names of rows, or the base alone, while adapters are merged.
            BackendError: the layer's backend cannot compute a stack, or not here.
        """
        kind = self._scope.kind() if self._scope.watched else "active"
        if kind == "ask" or (kind == "rows" and torch.compiler.is_compiling()):
            return self._uncompiled_forward(x, routes, gather=gather)
        base, weight = self.base_layer, self.weight
        if kind == "tokens":
            x = _as_computed(x[routes.source] if gather else x, weight)
            y = base_product(base, self.parameter, x, routes, self.transposed)
            delta = self._scope.local.tokens.update_experts(self, x, routes)
            return y if delta is None else y + delta.to(y.dtype)
        kernels = self._kernels_of_call(kind, x.device, (routes.order.shape[0], x.shape[-1]))
        kernels = tuple(map(self._here, kernels))
        is_plain = is_ordinary(weight)
        x = _as_computed(x, weight)
        if gather and not (kernels and is_plain):
            x, gather = x[routes.source], False
        if not kernels:
            return base_product(base, self.parameter, x, routes, self.transposed)
        try:
            if is_plain:
                return c3a_routed(
                    x,
                    weight,
                    self.bias,
                    kernels,
                    routes,
                    gather=gather,
                    transposed=self.transposed,
                    backend=self.backend,
                )
            y = base_product(base, self.parameter, x, routes, self.transposed)
            return y + c3a_routed(x, None, None, kernels, routes, backend=self.backend).to(y.dtype)
        except (ShapeError, BackendError) as error:
            held = (weight.mT if self.transposed else weight).shape
            if held != self._geometry.matrix_shape and not any(map(is_sharded, self._stored_kernels())):
                raise ConfigError(f"{self._label}: {SPREAD_LATE}") from error
            raise type(error)(f"{self._label}: {error}") from None

    @uncompiled
    def _uncompiled_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return C3AStacked.forward(self, *args, **kwargs)


@public
class C3AExperts(Holder):
    """An experts module of transformers whose stacked weights have adapters, in that module's place.

    It computes what the model's own experts do, by whichever implementation (`experts_implementation`: they differ in
    rounding alone), and the adapters' part of the rows that an expert gets: the pairs of tokens and experts are sorted
    by expert once, on their device, and each projection is one node of the autograd graph. Nothing of the size of all
    experts' weights is made. Products are computed in the weights' dtype, under autocast too, which does not cast
    stacked weights. With no adapter in force the model's own implementation runs.

    Args:
        base_layer: the experts.

    Attributes:
        base_layer: the experts.

    Raises:
        ConfigError: experts of a class that is not known.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        found = layout(base_layer)
        if found is None:
            raise ConfigError(
                f"C3AExperts goes around an experts module of transformers, got {type(base_layer).__name__}"
            )
        super().__init__(base_layer)
        self._layout: Layout = found

    @property
    def _is_expert_parallel(self) -> bool:
        """Transformers' note that experts may be elsewhere, which is the module's."""
        return getattr(self.base_layer, "_is_expert_parallel", False)  # older transformers notes nothing

    @_is_expert_parallel.setter
    def _is_expert_parallel(self, value: bool) -> None:
        base: Any = self.base_layer
        base._is_expert_parallel = value

    def compute(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts' own forward."""
        parts = self.parts_in_force()
        if not parts:
            return base_forward(self.base_layer)(self.base_layer, hidden_states, *args, **kwargs)
        compute = self._uniform if self._layout.kind == "llama4" else self._routed
        return compute(parts, hidden_states, *args, **kwargs)

    def _routed(
        self, parts: dict[str, Any], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """What transformers' implementations compute: [n_tokens, hidden], and of each token's experts [n_tokens, k]."""
        experts: Any = self.base_layer
        is_mxfp4 = self._layout.kind == "mxfp4"
        n_experts, partial = self._layout.n_experts, not is_mxfp4 and self._is_expert_parallel
        if not partial:  # a choice that was dropped (the index is n_experts) counts nothing, whoever computes it
            top_k_weights = top_k_weights.masked_fill(top_k_index >= n_experts, 0.0)
            top_k_index = top_k_index.clamp(max=n_experts - 1)
        places = routing.make(top_k_index, n_experts, partial=partial)
        y = self._project(parts, self._layout.up, hidden_states, places, gather=True)
        if is_mxfp4:
            y = mxfp4.apply_gate(experts, y)
        else:
            y = experts._apply_gate(y) if self._layout.gated else experts.act_fn(y)
        y = self._project(parts, self._layout.down, y, places)
        if getattr(experts, "has_post_expert_norm", False):  # which mxfp4's and older transformers' do not have
            y = experts.post_expert_norm(y)
        shares = top_k_weights.reshape(-1)[places.order].unsqueeze(-1)
        if places.partial:  # what has no expert here is no business of the router's gradient
            shares = shares.masked_fill(~places.valid().unsqueeze(-1), 0.0)
        y = (y * shares)[places.inverse]
        return y.unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

    def _uniform(self, parts: dict[str, Any], hidden_states: Tensor) -> Tensor:
        """What Llama 4's experts compute: each gets as many rows, [n_experts · n_rows, hidden], one after another."""
        experts: Any = self.base_layer
        places = routing.uniform(
            self._layout.n_experts, hidden_states.shape[0] // self._layout.n_experts, hidden_states.device
        )
        gate, up = self._project(parts, self._layout.up, hidden_states, places).chunk(2, dim=-1)
        return self._project(parts, self._layout.down, up * experts.act_fn(gate), places)

    def _project(self, parts: dict[str, Any], name: str, x: Tensor, places: Routes, *, gather: bool = False) -> Tensor:
        if name in parts:
            return parts[name](x, places, gather=gather)
        x = x[places.source] if gather else x
        return base_product(self.base_layer, name, x, places, self._layout.transposed)


def base_product(module: nn.Module, name: str, x: Tensor, routes: Routes, transposed: bool) -> Tensor:
    """One projection of experts, without adapters.

    Args:
        module: the experts.
        name: the projection's parameter.
        x: [n_rows, in], in the order of the routes; computed in the weight's dtype.
        routes: the experts of the rows.
        transposed: how the weight is stored.

    Returns:
        [n_rows, out]; rows without an expert are 0.

    Raises:
        BackendError: the weight is of a class (a quantized one) that does not compute it.
    """
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
    absent = ~routes.valid().unsqueeze(-1) if routes.partial else None
    if is_ordinary(weight):
        y = grouped_base(x.to(weight.dtype), weight, routes.offsets, transposed, routes.partial)
    else:
        x = x if absent is None else x.masked_fill(absent, 0.0)  # whose gradient is theirs
        y = foreign_product(module, name, x, routes.offsets[1:], transposed)
    y = y if bias is None else y + bias[routes.groups].to(y.dtype)
    return y if absent is None else y.masked_fill(absent, 0.0)


def _as_computed(x: Tensor, weight: Tensor) -> Tensor:
    return x.to(weight.dtype) if holds_values(weight) else x
