"""TRL's trainers with a model that is adapted in place: the reference is the policy as it was before training.

TRL knows PEFT's models alone. Of any other it loads the reference (DPO, KTO, GRPO, RLOO; the fixed teacher of SDFT and
SDPO) from the path in the model's configuration, where no adapter is, and multiplies by the output layer's weight
itself.
"""

import copy
import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

from c3a_triton.adapters.manager import AdapterManager
from c3a_triton.adapters.pretrained import is_fused_by_trl, refuse_adapted_head
from c3a_triton.bases.sharded import is_sharded
from c3a_triton.errors import AdapterStateError

__all__ = ["patch_trl", "patch_trl_when_imported", "reference_of", "unpatch_trl"]

# Where a trainer's class comes from a module that has one of these, it multiplies by the output layer's weight.
_MULTIPLIES = ("add_fused_lm_head", "DistillationTrainer", "AsyncDistillationTrainer")
_originals: dict[str, Any] = {}
_TRAINERS = "trl.trainer.base_trainer"


class _AtImport(MetaPathFinder):
    """Patches TRL as soon as its trainers' base has been imported. TRL imports them when they are asked for."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _TRAINERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                patch_trl()

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def patch_trl_when_imported() -> None:
    """Call `patch_trl` now, if TRL's trainers are imported, or else when they are; `apply` and `load_adapter` do it."""
    if _TRAINERS in sys.modules:
        patch_trl()
    elif not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport())


def patch_trl() -> None:
    """Let TRL's trainers take a copy of a model that is adapted in place as its reference. A second call does nothing.

    Trainers that multiply by the output layer's weight then refuse a model whose output layer is adapted in place.
    Everything else is as before.

    Raises:
        ImportError: there is no trl, or one without `trl.trainer.utils`.
    """
    utils = importlib.import_module("trl.trainer.utils")
    if "create_model_from_path" not in _originals and hasattr(utils, "create_model_from_path"):
        _originals["create_model_from_path"] = utils.create_model_from_path
        _exchange("create_model_from_path", utils.create_model_from_path, create_model_from_path)
    trainer = _base_trainer()
    if "__init__" not in _originals and trainer is not None:
        _originals["__init__"] = trainer.__init__
        trainer.__init__ = _init


def unpatch_trl() -> None:
    """End `patch_trl` and `patch_trl_when_imported`. Trainers that exist keep their references."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AtImport)]
    if "create_model_from_path" in _originals:
        _exchange("create_model_from_path", create_model_from_path, _originals.pop("create_model_from_path"))
    trainer = _base_trainer()
    if "__init__" in _originals and trainer is not None:
        trainer.__init__ = _originals.pop("__init__")


def reference_of(policy: nn.Module) -> nn.Module:
    """A frozen copy of an adapted model as it is now, in evaluation mode: what a trainer can take as its `ref_model`.

    Raises:
        AdapterStateError: the model's parameters are sharded or partitioned, so that a copy would have a part of them.
    """
    if any(map(is_sharded, policy.parameters())):
        raise AdapterStateError(
            f"the reference of this trainer is a copy of the {type(policy).__name__} before training, which cannot be "
            "made of sharded or partitioned parameters: give the trainer a ref_model of your own (load the base model, "
            "then c3a_triton.load_adapter), or adapt with PEFT after patch_peft()"
        )
    reference: Any = copy.deepcopy(policy).requires_grad_(False).eval()
    reference.c3a._watch.end()  # what there is to say of its layers, the policy says
    if is_fused_by_trl(reference):
        # An earlier trainer's, which goes on to the policy's own forward; the next trainer gives it another.
        del reference.forward
    return reference


def _base_trainer() -> Any:
    """The class from which TRL's trainers are derived; None in versions that have none."""
    try:
        return getattr(importlib.import_module(_TRAINERS), "_BaseTrainer", None)
    except ModuleNotFoundError:
        return None


def _exchange(name: str, old: Any, new: Any) -> None:
    """Put one function in another's place, wherever a module of TRL has taken it from `trl.trainer.utils`."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("trl.") and vars(module).get(name) is old:
            setattr(module, name, new)


def _is_adapted(model: Any) -> bool:
    return isinstance(getattr(model, "c3a", None), AdapterManager)


def create_model_from_path(model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """As TRL's, but a trainer that has its policy already and asks for that policy's own path gets its reference."""
    policy: Any = getattr(sys._getframe(1).f_locals.get("self"), "model", None)
    if _is_adapted(policy) and model_id == getattr(policy.config, "_name_or_path", None):
        return reference_of(policy)
    return _originals["create_model_from_path"](model_id, *args, **kwargs)


def _init(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
    """As TRL's, after what cannot be trained is refused."""
    if _is_adapted(model):
        own = [sys.modules[cls.__module__] for cls in type(self).__mro__ if cls.__module__.startswith("trl.")]
        if any(hasattr(module, name) for module in own for name in _MULTIPLIES):
            refuse_adapted_head(model, type(self).__name__)
    _originals["__init__"](self, model, *args, **kwargs)
