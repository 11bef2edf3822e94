"""What each layer of a language model is given of a packed row, as a trial shows, with some tokens and twice as many.

It may be every token in its order, those of which logits are kept, or something else, such as routed tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from c3a_triton.errors import ConfigError

from .base_model import base_modules
from .names import Scope

__all__ = ["KEPT", "OTHER", "TOKENS", "token_layouts"]

TOKENS, KEPT, OTHER = "tokens", "kept", "other"

_N_TOKENS = 5
# What rounding changes of a layer's input when more tokens are computed beside.
_AGREE = 1e-2


@torch.no_grad()
def token_layouts(model: Any, scope: Scope) -> dict[str, str]:
    """Name → layout of each module that a causal language model calls, by calls of its base with a few made-up tokens.

    Args:
        model: the model.
        scope: that of its adapted layers.

    Raises:
        ConfigError: it cannot be called with nothing but tokens.
    """
    seen: list[dict[str, list[Tensor]]] = []
    for n_tokens in (_N_TOKENS, 2 * _N_TOKENS):
        noted: dict[str, list[Tensor]] = {}
        own: dict[str, Any] = {}  # by which calls of other threads are told
        handles = [
            module.register_forward_pre_hook(partial(_note, scope, own, noted.setdefault(name, [])), with_kwargs=True)
            for name, module in base_modules(model)
        ]
        tokens = torch.arange(1, n_tokens + 1, device=model.device)[None] % model.config.get_text_config().vocab_size
        keeps = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        try:
            with scope.bound(is_open=False, probe=own):
                model(input_ids=tokens, use_cache=False, **keeps)
        except Exception as error:
            raise ConfigError(
                f"which tokens the layers of {type(model).__name__} see cannot be told: a call with {n_tokens} tokens "
                f"failed with {type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        seen.append(noted)
    of_some, of_twice = seen
    return {name: _layout(of_some[name], of_twice[name]) for name in of_twice if of_twice[name]}


def _note(scope: Scope, own: dict[str, Any], noted: list[Tensor], module: nn.Module, args: Any, kwargs: Any) -> None:
    call = scope.said()
    if call is None or call.probe is not own:
        return
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    noted.append(torch.empty(0) if x is None else x.detach())


def _layout(some: Sequence[Tensor], twice: Sequence[Tensor]) -> str:
    found = {_of_call(a, b) for a, b in zip(some, twice, strict=False)} if len(some) == len(twice) else {OTHER}
    return found.pop() if len(found) == 1 else OTHER


def _of_call(some: Tensor, twice: Tensor) -> str:
    """The layout of an input of which there are tokens in the last dimension but one, or of ids in the last."""
    of_ids = not some.is_floating_point()
    a, b = (x.reshape(-1, 1) if of_ids else x.flatten(0, -2) if x.dim() > 1 else x[None] for x in (some, twice))
    if (len(a), len(b)) == (1, 1):
        return KEPT
    if (len(a), len(b)) != (_N_TOKENS, 2 * _N_TOKENS):
        return OTHER
    a, b = a.double(), b[:_N_TOKENS].double()
    return TOKENS if bool(((a - b).abs() <= _AGREE * a.abs().max()).all()) else OTHER
