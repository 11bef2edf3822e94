"""Layers that a model never calls: told once, by name, and left out of a merge. Of right use nothing is said."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import c3a_triton
from c3a_triton import C3AConfig

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def adapted(model: nn.Module, *targets: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = C3AConfig(block_size=4, target_modules=list(targets), init_weights="gaussian", **fields)
    return c3a_triton.apply(model, config)


@contextmanager
def hearing() -> Iterator[list[str]]:
    """What is said of layers that are not called, or that get no gradient."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [text for w in caught if "never called" in (text := str(w.message)) or "no gradient" in text]


def hooks(model: nn.Module) -> list[str]:
    """Names of the modules that have a hook of the watch."""
    return [
        name
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if type(getattr(hook, "__self__", None)).__name__ == "Watch"
    ]


class Block(nn.Module):
    """A block of which a method, given by the test, is the forward."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.make = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.make(self, *args, **kwargs)


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def by_weight(self: Any, x: Tensor) -> Tensor:
    return F.linear(self.q(x), self.v.weight)


def reads_a_weight() -> nn.Module:
    torch.manual_seed(1)
    return Block(by_weight, q=linear(), v=linear())


def tied() -> nn.Module:
    torch.manual_seed(1)
    model = Block(lambda self, x: self.q(self.called(x)), q=linear(), v=linear(), called=linear())
    model.called.weight = model.v.weight  # type: ignore[union-attr]
    return model


def in_a_list() -> nn.Module:
    torch.manual_seed(1)
    model = Block(lambda self, x: self.heads[0](self.q(x)), q=linear(), v=linear())
    model.heads = [model.v]  # type: ignore[assignment]
    return model


def fused() -> nn.Module:
    torch.manual_seed(1)
    return Block(lambda self, x: self.q(self.qkv(x)), q=linear(), v=linear(), qkv=linear())


PASSED_BY = [reads_a_weight, tied, in_a_list, fused]


@pytest.mark.parametrize("build", PASSED_BY)
@pytest.mark.parametrize("how", ["eval", "train", "eval with gradients"])
def test_what_is_never_called_is_told_once_and_not_merged(build: Callable[[], nn.Module], how: str) -> None:
    model = adapted(build(), "q", "v").train(how == "train")
    with hearing() as said, torch.set_grad_enabled(how != "eval"):
        for _ in range(3):
            y = model(X)
            if how != "eval":
                y.sum().backward()
    assert len(said) == 1
    assert "never called" in said[0]
    assert ": v." in said[0]
    # The first training step is still to be watched where there was none.
    assert hooks(model) == ([] if how == "train" else [""]) + ["v"]
    with pytest.warns(UserWarning, match=r"left out of the merge: v\. .*merge_uncalled=True"):
        model.c3a.merge_adapter()
    torch.testing.assert_close(model(X), y)
    model.c3a.unmerge_adapter()
    torch.testing.assert_close(model(X), y)
    with pytest.warns(UserWarning, match="left out of the merge: v"):
        merged = model.c3a.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert not hooks(merged)


def test_merging_all_the_same() -> None:
    model = adapted(reads_a_weight(), "q", "v").eval()
    model(X)
    weight = model.v.base_layer.weight.clone()
    delta = model.v.get_delta_weight("default")
    model.c3a.merge_adapter(merge_uncalled=True)
    torch.testing.assert_close(model.v.base_layer.weight, weight + delta)
    model.c3a.unmerge_adapter()
    merged = model.c3a.merge_and_unload(merge_uncalled=True)
    torch.testing.assert_close(merged.v.weight, weight + delta)


def test_a_layer_that_is_called_later_is_merged() -> None:
    model = Block(lambda self, x, other=False: self.v(self.q(x)) if other else self.q(x), q=linear(), v=linear())
    model = adapted(model, "q", "v").eval()
    with hearing() as said:
        model(X)
    assert len(said) == 1
    y = model(X, other=True)
    assert set(hooks(model)) == {""}
    model.c3a.merge_adapter()
    torch.testing.assert_close(model(X, other=True), y)


def test_when_all_is_decided_no_hook_is_left() -> None:
    model = adapted(nn.Sequential(linear(), Block(lambda self, x: self.q(x), q=linear())), "0", "q")
    with hearing() as said:
        model(X).sum().backward()
    assert not said
    model(X)
    assert not hooks(model)
    # A further adapter's layers are watched as the first one's were.
    model.c3a.add_adapter("second", C3AConfig(block_size=4, target_modules=["q"]))
    assert hooks(model) == [""]
    with hearing() as said:
        model(X).sum().backward()
    assert not said
    assert not hooks(model)


def test_a_further_adapter_on_other_layers() -> None:
    model = adapted(
        Block(
            lambda self, x: F.linear(self.q(x), self.v.weight) + F.linear(x, self.w.weight),
            q=linear(),
            v=linear(),
            w=linear(),
        ),
        "q",
        "v",
    )
    model.eval()(X)
    with hearing() as said:
        model.c3a.add_adapter("second", C3AConfig(block_size=4, target_modules=["q", "v", "w"]))
        model(X)
    assert [": w." in text for text in said] == [True]
    assert model.c3a._watch.uncalled == {"v", "w"}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def experts(self: Any, x: Tensor, chosen: tuple[int, ...] = (0,)) -> Tensor:
    return sum(self.experts[i](x) for i in chosen)  # type: ignore[return-value]


def of_experts(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Block(experts, experts=nn.ModuleList([kind(), kind()]))


def with_heads() -> nn.Module:
    heads = nn.ModuleDict({"a": linear(), "b": linear()})
    return Block(lambda self, x: self.heads["a"](self.q(x)), q=linear(), heads=heads)


def with_a_tower() -> nn.Module:
    return Block(lambda self, x, image=None: self.text(x), text=Mlp(), vision=Mlp())


def dropping() -> nn.Module:
    return Block(lambda self, x: self.layers[1](x), layers=nn.ModuleList([Mlp(), Mlp(), Mlp()]))


def looping() -> nn.Module:
    return Block(lambda self, x: self.m(self.m(x)), m=Mlp())


def checkpointed(reentrant: bool) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = checkpoint(self.m, x.requires_grad_(), use_reentrant=reentrant)
        return checkpoint(self.n, y, use_reentrant=reentrant)

    return Block(forward, m=Mlp(), n=Mlp())


RIGHT: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "experts without tokens": (of_experts(Mlp), ["up", "down"]),
    "experts that are layers": (of_experts(linear), ["0", "1"]),
    "one of the experts adapted": (of_experts(linear), ["1"]),
    "a head for each task": (with_heads, ["q", "b"]),
    "a tower without input": (with_a_tower, ["up", "down"]),
    "dropped layers": (dropping, ["up", "down"]),
    "a module in a loop": (looping, ["up", "down"]),
    "checkpointed": (lambda: checkpointed(False), ["up", "down"]),
    "checkpointed reentrantly": (lambda: checkpointed(True), ["up", "down"]),
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_said_of_what_is_right(kind: str, training: bool) -> None:
    build, targets = RIGHT[kind]
    model = adapted(build(), *targets).train(training)
    with hearing() as said:
        for _ in range(2):
            y = model(X.clone())
            if y.requires_grad:
                y.sum().backward()
    assert not said


def test_what_is_merged_of_blocks_that_did_not_run() -> None:
    model = adapted(RIGHT["experts without tokens"][0](), "up", "down").eval()
    model(X)
    y = model(X, chosen=(1,))
    torch.testing.assert_close(model.c3a.merge_and_unload()(X, chosen=(1,)), y)


def test_a_block_that_runs_later() -> None:
    """A vision tower that reads a weight: the first forward without an image says nothing of it, the next one does."""
    model = Block(
        lambda self, x, image=None: self.q(x) if image is None else self.q(self.vision(x)),
        q=linear(),
        vision=reads_a_weight(),
    )
    model = adapted(model, "q", "v").eval()
    with hearing() as said:
        model(X)
    assert not said
    with hearing() as said:
        model(X, image=X)
        model(X, image=X)
    assert [": vision.v." in text for text in said] == [True]


def test_a_block_that_another_call_uses_on_its_own() -> None:
    model = adapted(Block(lambda self, x: self.b(x), a=Mlp(), b=Mlp()), "up", "down").eval()
    with hearing() as said:
        model.a(X)
        model(model.a(X))
    assert not said


class Methods(nn.Module):
    """Its forward is not what computes: a model calls other methods, one of which reads a weight in training."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = linear(), linear()

    def begin(self, x: Tensor) -> Tensor:
        return self.q(x)

    def end(self, x: Tensor) -> Tensor:
        return F.linear(x, self.v.weight.clamp(-1, 1)) if self.training else self.v(x)


@pytest.mark.parametrize("evaluated", [True, False])
def test_methods_in_place_of_a_forward(evaluated: bool) -> None:
    model = adapted(Block(lambda self, x: self.a.end(self.a.begin(x)), a=Methods()), "q", "v")
    with hearing() as said:
        if evaluated:
            model.eval()(X)
        model.train()(X).sum().backward()
    assert len(said) == 1
    assert "a.v" in said[0]
    assert "a.q" not in said[0]


def test_a_trained_copy_that_is_read() -> None:
    model = adapted(reads_a_weight(), "q", modules_to_save=["v"]).train()
    with hearing() as said:
        model(X).sum().backward()
        model.eval()(X)
    assert not said
    assert model.v.modules_to_save["default"].weight.grad is not None


def test_a_trained_copy_that_others_read() -> None:
    model = adapted(in_a_list(), "q", modules_to_save=["v"]).eval()
    assert model.v.weight.shape == (8, model.v.in_features)  # somebody looks before the model runs
    with hearing() as said, torch.no_grad():
        model(X)
    assert [": v." in text for text in said] == [True]


@pytest.mark.parametrize("training", [True, False])
def test_a_trained_copy_that_is_reached_by_another_way(training: bool) -> None:
    model = adapted(in_a_list(), "q", modules_to_save=["v"]).train(training)
    with hearing() as said:
        with torch.set_grad_enabled(training):
            y = model(X)
        if training:
            y.sum().backward()
    assert [": v." in text for text in said] == [True]
    torch.testing.assert_close(model.c3a.merge_and_unload()(X), y)


def test_what_is_computed_without_gradients() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.q(x)

    model = adapted(Block(forward, q=linear(), frozen=Mlp()), "q", "up", "down").train()
    with hearing() as said:
        for _ in range(2):
            model(X).sum().backward()
    assert len(said) == 1
    assert "frozen.up, frozen.down" in said[0]
    assert "first backward pass gave no gradient" in said[0]
    y = model.eval()(X)
    torch.testing.assert_close(model.c3a.merge_and_unload()(X), y)  # it computes, so it is merged


def test_a_gradient_of_something_else_is_no_training_step() -> None:
    model = adapted(Mlp(), "up", "down").train()
    x = X.clone().requires_grad_()
    with hearing() as said:
        torch.autograd.grad(model(x).sum(), x)
        model(x).sum().backward()
    assert not said
    assert not hooks(model)


def test_input_embeddings_that_are_passed_by() -> None:
    from tiny_models import IDS, llama

    model = adapted(llama().eval(), "q_proj", "embed_tokens")
    with hearing() as said:
        embeddings = model.get_input_embeddings()(IDS)
        model(inputs_embeds=embeddings)
        model(input_ids=IDS)
    assert not said


def test_a_forward_that_fails_decides_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("out of memory")
        return by_weight(self, x)

    model = Block(lambda self, x: self.block(x), block=Block(forward, q=linear(), v=linear()))
    model = adapted(model, "q", "v").eval()
    model.block.fails = True
    with hearing() as said, pytest.raises(RuntimeError, match="out of memory"):
        model(X)
    assert not said
    model.block.fails = False
    with hearing() as said:
        model(X)
    assert [": block.v." in text for text in said] == [True]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_a_watch_of_their_own(when: str, how: str) -> None:
    model = adapted(MODEL(), "q", "v").eval()
    if when == "after":
        model(X)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with hearing() as said:
        y = other(X)
    assert len(said) == (when == "before")
    assert (other.c3a._watch.uncalled, other.c3a._watch.model) == ({"v"}, other)
    with pytest.warns(UserWarning, match="left out of the merge: v"):
        torch.testing.assert_close(other.c3a.merge_and_unload()(X), y)
    assert not hooks(other)
    with hearing() as said:
        model(X)
    assert len(said) == (when == "before")
    assert "v" in hooks(model)


class MODEL(Block):
    """At the module's level, for pickle."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(by_weight, q=linear(), v=linear())


def test_replicas_of_data_parallel_decide_nothing() -> None:
    model = adapted(reads_a_weight(), "q", "v").eval()
    replica = model._replicate_for_data_parallel()
    replica._modules = model._modules
    with hearing() as said:
        replica(X)
    assert not said
    with hearing() as said:
        model(X)
    assert len(said) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_compiled_models(first: str, training: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = adapted(MODEL(), "q", "v").train(training)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    calls = [model, compiled] if first == "eager" else [compiled, model]
    with hearing() as said, torch.set_grad_enabled(training):
        for call in (*calls, compiled, compiled):
            y = call(X)
            if training:
                y.sum().backward()
    assert len(said) == 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["module", "in place", "function"])
def test_compiled_parts(how: str) -> None:
    """Layers that are called from compiled code call no hook, and nothing is said of them."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = adapted(Block(lambda self, x: self.b(self.a(x)), a=Mlp(), b=Mlp()), "up", "down").eval()
    if how == "module":
        model.a = torch.compile(model.a, backend=counter, fullgraph=True)
    elif how == "in place":
        model.a.compile(backend=counter, fullgraph=True)
    else:
        run = torch.compile(lambda x: model.a.down(model.a.up(x)), backend=counter, fullgraph=True)
        model.make = lambda self, x: self.b(run(x))
    with hearing() as said, torch.no_grad():
        for _ in range(3):
            y = model(X)
    assert not said
    assert counter.frame_count == 1
    if how != "module":  # whose name has changed
        torch.testing.assert_close(model.c3a.merge_and_unload()(X), y)


def test_a_further_adapter_beside_compiled_code() -> None:
    """Code that was compiled before, and needs no compilation now, calls no hook either."""
    torch._dynamo.reset()
    model = adapted(Block(lambda self, x: x, m=Mlp()), "up", "down").eval()
    run = torch.compile(lambda x: model.m.down(model.m.up(x)), backend="eager")
    model.make = lambda self, x: run(x)
    with hearing() as said, torch.no_grad():
        model(X)
        model.c3a.add_adapter("second", C3AConfig(block_size=4, target_modules=["up", "down"]))
        for _ in range(3):
            model(X)
    assert not said


def test_transforms_of_torch_func() -> None:
    model = adapted(Mlp(), "up", "down").train()
    kernels = {name: w.detach() for name, w in model.named_parameters() if w.requires_grad}
    with hearing() as said:
        gradients = torch.func.grad(lambda w: torch.func.functional_call(model, w, (X,)).sum())(kernels)
    assert not said
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_outputs_of_any_form() -> None:
    """The backward pass is seen whichever form the output has, also one that torch's pytrees do not know."""
    from dataclasses import dataclass

    @dataclass
    class Output:
        parts: dict[str, Tensor]

    def forward(self: Any, x: Tensor) -> Output:
        return Output({"y": self.q(x), "aside": self.v(x)})

    model = adapted(Block(forward, q=linear(), v=linear()), "q", "v").train()
    with hearing() as said:
        model(X).parts["y"].sum().backward()
    assert len(said) == 1
    assert "no gradient to what is trained there: v." in said[0]


def test_other_threads() -> None:
    """A thread that is in a forward of its own has no say in this one's."""
    import threading

    inside, go = threading.Event(), threading.Event()

    def forward(self: Any, x: Tensor, waits: bool = False) -> Tensor:
        x = self.a(x)
        if waits:
            inside.set()
            go.wait(10)
        return self.b(x)

    model = adapted(Block(forward, a=Mlp(), b=Mlp()), "up", "down").eval()
    with hearing() as said:
        thread = threading.Thread(target=model, args=(X,), kwargs={"waits": True})
        thread.start()
        inside.wait(10)
        model(X)
        go.set()
        thread.join()
        model(X)
    assert not said


def test_names_of_many_layers_are_cut() -> None:
    model = Block(lambda self, x: x, **{f"v{i}": linear() for i in range(9)})
    with pytest.warns(UserWarning, match=r"v4, … \(9 layers\)"):
        adapted(model, *(f"v{i}" for i in range(9)))(X)
