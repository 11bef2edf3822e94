"""Which adapters a call computes with: threads, tasks, compiled code, and inputs that do not follow from the batch."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from tiny_models import IDS, MLP, llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import c3a_triton
from c3a_triton import C3AConfig
from c3a_triton.errors import AdapterStateError, ShapeError

NAMES = ("one", "two", "__base__")


def adapted(model: nn.Module, targets: Any = "all-linear", block_size: int = 4) -> nn.Module:
    """Two adapters that change the outputs; "one" is active."""
    config = C3AConfig(block_size=block_size, target_modules=targets)
    model = c3a_triton.apply(model.eval(), config, "one")
    model.c3a.add_adapter("two", config)
    generator = torch.Generator().manual_seed(1)
    for _, layer in model.c3a.layers():
        for kernel in layer.c3a_kernel.values():
            kernel.data.normal_(0, 3, generator=generator)
    return model


def alone(model: nn.Module, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    """What each adapter gives for the whole batch."""
    found = {}
    for name in ("two", "one"):
        model.c3a.set_adapter(name)
        found[name] = call()
    with model.c3a.disable_adapter():
        found["__base__"] = call()
    assert not torch.allclose(found["one"], found["two"])
    assert not torch.allclose(found["one"], found["__base__"])
    return found


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Threads and tasks


def in_threads(n_rounds: int, *work: Callable[[], object]) -> None:
    """Each function so often, all of them at the same time; errors are raised here."""
    start = threading.Barrier(len(work))

    def run(function: Callable[[], object]) -> None:
        start.wait(60)
        with torch.no_grad():
            for _ in range(n_rounds):
                function()

    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(run, function) for function in work]:
            done.result()


def test_threads_that_name_their_adapters() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    model.c3a.set_adapter(["one", "two"])
    both = model(x)
    single = alone(model, lambda: model(x))
    model.c3a.set_adapter(["one", "two"])
    rows = torch.stack([single[name][row] for row, name in enumerate(NAMES)])

    def check(expected: Tensor, call: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: torch.testing.assert_close(call(), expected)

    def using(names: Any) -> Tensor:
        with model.c3a.using(names):
            return model(x)

    def disabled() -> Tensor:
        with model.c3a.disable_adapter():
            return model(x)

    in_threads(
        30,
        check(rows, lambda: model(x, adapter_names=NAMES)),
        check(single["two"], lambda: using(["two"] * 3)),
        check(single["__base__"], disabled),
        check(both, lambda: using(None)),
    )
    torch.testing.assert_close(model(x), both)
    assert not any(layer.disable_adapters for _, layer in model.c3a.layers())


def test_a_thread_that_says_nothing_while_others_do_is_refused() -> None:
    """It may have been started within the context, as a streamer's is: nobody can tell what to compute."""
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    active = model(x)
    contexts: tuple[Any, ...] = (lambda: model.c3a.using(NAMES), model.c3a.disable_adapter)
    with ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(model, x).result(), active)
        for context in contexts:
            with context():
                expected = model(x)
                assert not torch.allclose(expected, active)
                with pytest.raises(AdapterStateError, match="another thread"):
                    pool.submit(model, x).result()
                copied = contextvars.copy_context()
                torch.testing.assert_close(pool.submit(copied.run, model, x).result(), expected)
            torch.testing.assert_close(pool.submit(model, x).result(), active)
        # Names that are a call's own concern nobody else, and other models neither.
        other = adapted(MLP(), block_size=6)
        with model.c3a.using(NAMES):
            torch.testing.assert_close(pool.submit(other, x).result(), other(x))


def test_tasks_take_turns() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    single = alone(model, lambda: model(x))

    async def serve(name: str) -> None:
        with model.c3a.using([name] * 3):
            for _ in range(5):
                await asyncio.sleep(0)
                torch.testing.assert_close(model(x), single[name])
                torch.testing.assert_close(await asyncio.to_thread(model, x), single[name])

    async def silent() -> None:
        await asyncio.sleep(0)
        with pytest.raises(AdapterStateError, match="another thread or task"):
            model(x)

    async def main() -> None:
        await asyncio.gather(*(serve(name) for name in single), silent())

    asyncio.run(main())
    torch.testing.assert_close(model(x), single["one"])


def test_contexts_nest_and_end_with_errors() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    single = alone(model, lambda: model(x))
    with model.c3a.using(["two"] * 3):
        with suppress(KeyboardInterrupt), model.c3a.using(["one"] * 3):
            with model.c3a.disable_adapter():
                torch.testing.assert_close(model(x), single["__base__"])
            torch.testing.assert_close(model(x), single["one"])
            raise KeyboardInterrupt
        torch.testing.assert_close(model(x), single["two"])
        torch.testing.assert_close(model(x, adapter_names=["one"] * 3), single["one"])
        torch.testing.assert_close(model(x), single["two"])
    torch.testing.assert_close(model(x), single["one"])


def test_an_interrupted_call_leaves_nothing() -> None:
    """torch calls no hook after a keyboard interrupt."""
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    active = model(x)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.second.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x, adapter_names=["two"] * 3)
    handle.remove()
    torch.testing.assert_close(model(x), active)
    torch.testing.assert_close(model(x, adapter_names=["one"] * 3), active)


def test_what_a_context_was_copied_with_holds_when_the_context_has_ended() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    single = alone(model, lambda: model(x))
    with model.c3a.using(["two"] * 3):
        copied = contextvars.copy_context()
    torch.testing.assert_close(model(x), single["one"])
    torch.testing.assert_close(copied.run(model, x), single["two"])
    del copied
    assert not model.c3a._scope.watched


def test_contexts_of_generators_end_in_any_order() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    single = alone(model, lambda: model(x))

    def stream(name: str) -> Iterator[Tensor]:
        with model.c3a.using([name] * 3):
            yield model(x)
            yield model(x)

    first, second = stream("one"), stream("two")
    next(first), next(second)
    first.close()
    torch.testing.assert_close(next(second), single["two"])
    second.close()
    with (
        ThreadPoolExecutor(1) as pool,
        model.c3a.using(["two"] * 3),
    ):  # nothing is left of them to be mistaken for names
        assert pool.submit(lambda: model.c3a._scope.said()).result() is None
    assert model.c3a._scope.said() is None


def test_adapters_whose_names_are_in_use_stay() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    with model.c3a.using(["two"] * 3):
        expected = model(x)
        for verb in (lambda: model.c3a.delete_adapter("two"), lambda: model.c3a.rename_adapter("two", "three")):
            with pytest.raises(AdapterStateError, match="rows are computed with the adapter 'two'"):
                verb()
        model.c3a.rename_adapter("one", "other")
        torch.testing.assert_close(model(x), expected)
    model.c3a.rename_adapter("two", "three")


def test_a_merge_in_another_thread_does_not_pass_for_the_base() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)

    def merge() -> None:
        with model.c3a.using(None):
            model.c3a.merge_adapter()

    with ThreadPoolExecutor(1) as pool, model.c3a.disable_adapter():
        pool.submit(merge).result()
        with pytest.raises(AdapterStateError, match="merged while adapters are disabled"):
            model(x)


def test_outputs_that_compute_later_are_refused() -> None:
    class Streaming(MLP):
        def forward(self, x: Tensor) -> Iterator[Tensor]:
            yield super().forward(x)

    model, x = adapted(Streaming(), block_size=6), torch.randn(3, 12)
    with pytest.raises(AdapterStateError, match="returns a generator"):
        model(x, adapter_names=["two"] * 3)
    with model.c3a.using(["two"] * 3):
        expected = next(iter(model(x)))
    model.c3a.set_adapter("two")
    torch.testing.assert_close(expected, next(model(x)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_computed_again_with_the_innermost_names(reentrant: bool) -> None:
    """Contexts within contexts, and checkpoints within checkpoints; what no checkpoint needs is not remembered."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.on = nn.Linear(8, 8), nn.Linear(8, 8), False

        def again(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return checkpoint(function, x, use_reentrant=reentrant) if self.on else function(x)

        def forward(self, x: Tensor) -> Tensor:
            inner = lambda x: self.second(torch.tanh(x))  # noqa: E731
            return self.again(lambda x: torch.tanh(self.first(self.again(inner, x))), x.clone().requires_grad_())

    model, x = adapted(Checkpointed()), torch.randn(3, 8)
    for _, layer in model.c3a.layers():
        layer.c3a_kernel.requires_grad_(True)

    def grads(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with torch.enable_grad():
        expected = grads(model(x, adapter_names=NAMES).sum())
        with model.c3a.disable_adapter():
            assert not grads(model(x).sum())
        assert not model.c3a._scope.watched
        model.on = True
        with model.c3a.using(NAMES[::-1]):
            loss = model(x, adapter_names=NAMES).sum()
            with model.c3a.using(NAMES):
                nested = model(x).sum()
            with model.c3a.disable_adapter():
                base = model(x).sum()
        model(x).sum()
        torch.testing.assert_close(grads(loss), expected)
        torch.testing.assert_close(grads(nested), expected)
        assert not grads(base)


# Compiled code


def test_one_graph_for_every_set_of_names_in_every_thread() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    single = alone(model, lambda: model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def called() -> Tensor:
        try:
            return compiled(x)
        except RuntimeError as error:
            # torch's own false alarm: while one thread asks a graph's guards, another may sort them.
            if "runtime guards failed even though they passed" not in str(error):
                raise
            return called()

    def rows(*names: str) -> None:
        with model.c3a.using(names):
            expected = torch.stack([single[name][row] for row, name in enumerate(names)])
            torch.testing.assert_close(called(), expected)

    def disabled() -> None:
        with model.c3a.disable_adapter():
            torch.testing.assert_close(called(), single["__base__"])

    def active() -> None:
        with model.c3a.using(None):
            torch.testing.assert_close(called(), single["one"])

    torch.testing.assert_close(compiled(x), single["one"])
    rows(*NAMES)
    disabled()
    active()
    with torch.compiler.set_stance("fail_on_recompile"):
        rows("two", "two", "one")
        disabled()
        active()
        torch.testing.assert_close(compiled(x), single["one"])
        in_threads(20, lambda: rows("two", "__base__", "one"), lambda: rows(*NAMES), disabled, active)


def test_compiled_code_asks_where_it_cannot_see() -> None:
    """Names in the call, tasks, and threads that say nothing: outside of the graph."""
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    single = alone(model, lambda: model(x))
    compiled = torch.compile(model, backend="aot_eager")
    for name in single:
        torch.testing.assert_close(compiled(x, adapter_names=[name] * 3), single[name])
    torch.testing.assert_close(compiled(x), single["one"])

    async def serve(name: str) -> None:
        with model.c3a.using([name] * 3):
            await asyncio.sleep(0)
            torch.testing.assert_close(compiled(x), single[name])
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(serve(name) for name in single))

    asyncio.run(main())
    with (
        model.c3a.using(NAMES),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(AdapterStateError, match="another thread"),
    ):
        pool.submit(compiled, x).result()


def test_no_task_leaves_compiled_code_asking() -> None:
    torch.compiler.reset()  # how often one class is compiled is limited, whichever tests did it
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    async def main() -> None:
        entered = asyncio.Event()

        async def first() -> None:
            with model.c3a.using(["one"] * 3):
                await entered.wait()

        async def second() -> None:
            with model.c3a.using(["two"] * 3):
                entered.set()
                await asyncio.sleep(0.01)

        await asyncio.gather(first(), second())

    asyncio.run(main())
    torch.testing.assert_close(compiled(x), expected)


# Inputs that do not follow from the batch


class TimeFirst(nn.Module):
    """Its layers see [T, batch, width], as XLNet's and torch's own default layout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.embed(ids).transpose(0, 1)))).transpose(0, 1)


class Relative(TimeFirst):
    """A layer sees positions, without a batch."""

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.first(self.embed(torch.arange(6)[None]))
        return self.head(torch.tanh(self.embed(ids) + positions.mean(1, keepdim=True)))


class Flat(TimeFirst):
    """A layer sees all tokens in the batch's order."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embed(ids).flatten(0, 1)))
        return self.head(x.unflatten(0, ids.shape))


class TimeFirstFlat(TimeFirst):
    """A layer sees all tokens, time by time."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embed(ids).transpose(0, 1).flatten(0, 1)))
        return self.head(x.unflatten(0, (ids.shape[1], ids.shape[0])).transpose(0, 1))


class Routed(TimeFirst):
    """Each of two experts sees the tokens that were routed to it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        y, odd = torch.zeros(x.shape[0], 8), ids.flatten() % 2 == 1
        y[odd] = torch.tanh(self.first(x[odd]))
        return self.head(y.unflatten(0, ids.shape))


class Doubled(TimeFirst):
    """The batch twice, one after another, as guidance without a classifier makes it."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.cat([self.embed(ids)] * 2)))
        return self.head(x[: ids.shape[0]] + x[ids.shape[0] :])


@pytest.mark.parametrize("n_tokens", [3, 6, 5])
@pytest.mark.parametrize("kind", [TimeFirst, Relative, Flat, TimeFirstFlat, Routed, Doubled])
def test_rows_of_any_layout_equal_one_by_one(kind: type[nn.Module], n_tokens: int) -> None:
    torch.manual_seed(0)
    model = adapted(kind())
    ids = torch.randint(1, 32, (3, n_tokens), generator=torch.Generator().manual_seed(n_tokens))
    with model.c3a.using(NAMES):
        y = model(ids)
    named = model(ids, adapter_names=NAMES)
    trained = model.train()(ids, adapter_names=NAMES)
    model.eval()
    for row, name in enumerate(NAMES):
        own = alone(model, lambda row=row: model(ids[row : row + 1]))[name][0]
        for found in (y, named, trained):
            torch.testing.assert_close(found[row], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [[[5] * 6] * 2, [[5] * 6, [7] * 6], [[3, 5, 7, 9, 11, 13]] * 2])
def test_what_routed_tokens_show_by_chance_is_not_taken_for_a_rule(first: list[list[int]]) -> None:
    """Rows that are alike give each expert as many tokens."""
    torch.manual_seed(0)
    model, names = adapted(Routed()), NAMES[:2]
    model(torch.tensor(first), adapter_names=names)
    for _ in range(20):
        ids = torch.randint(1, 32, (2, 6))
        rows = []
        for row, name in enumerate(names):
            with model.c3a.using([name]):
                rows.append(model(ids[row : row + 1])[0])
        torch.testing.assert_close(model(ids, adapter_names=names), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_outputs_of_pairs_of_rows_are_refused() -> None:
    class Pairs(Relative):
        def forward(self, ids: Tensor) -> Tensor:
            y = super().forward(ids).flatten(1)
            return y @ y.T

    with pytest.raises(ShapeError, match=r"is of no single row"):
        adapted(Pairs())(torch.randint(1, 32, (4, 6)), adapter_names=["one", "two"] * 2)


def test_replicas_are_tried_out_once() -> None:
    model, x = adapted(MLP(), block_size=6), torch.randn(3, 12)
    expected = model(x, adapter_names=NAMES)
    known = len(model.c3a._scope.trials)
    replica = model._replicate_for_data_parallel()
    torch.testing.assert_close(replica(x, adapter_names=NAMES), expected)
    assert len(model.c3a._scope.trials) == known


def test_what_is_tried_out_leaves_no_trace() -> None:
    class Noisy(TimeFirst):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.drop(self.norm(self.first(self.embed(ids)).transpose(1, 2)).transpose(1, 2)))

    model = adapted(Noisy()).train()
    model.norm.eval()
    model.requires_grad_(True)
    ids = torch.randint(1, 32, (3, 6))
    mean, state = model.norm.running_mean.clone(), torch.get_rng_state()
    with torch.enable_grad():
        model(ids, adapter_names=NAMES).sum().backward()
    torch.testing.assert_close(model.norm.running_mean, mean)
    assert model.drop.training
    assert not model.norm.training
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    model.c3a.set_adapter("one")
    model(ids)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_layer_whose_rows_cannot_be_told_is_refused_by_name() -> None:
    class WithLoss(TimeFirst):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(ids)
            return y.square().mean(), y

    model, ids = adapted(WithLoss()), torch.randint(1, 32, (3, 6))
    with pytest.raises(ShapeError, match=r"first: .*loss"):
        model(ids, adapter_names=NAMES)
    loss, _ = model(ids, adapter_names=["two"] * 3)
    model.c3a.set_adapter("two")
    torch.testing.assert_close(loss, model(ids)[0])
    # A layer that is called by itself, or in a graph: nothing is known of its batch.
    model = adapted(TimeFirst())
    with model.c3a.using(NAMES):
        for x in (torch.randn(6, 3, 8), torch.randn(3, 3, 8)):
            with pytest.raises(ShapeError, match="first: 3 adapter names"):
                model.first(x)
        model.first(torch.randn(3, 6, 8))
        with pytest.raises(ShapeError, match="first: 3 adapter names"):
            torch.compile(model, backend="eager")(ids)


class Lone(TimeFirst):
    """A layer sees a single vector for the whole batch, and something is drawn in evaluation."""

    def forward(self, ids: Tensor) -> Tensor:
        vector = self.first(self.embed.weight[0])
        return self.head(torch.tanh(self.embed(ids) + vector)) * torch.rand(ids.shape[1], 1)


def test_a_vector_for_all_rows_and_random_numbers() -> None:
    model, ids = adapted(Lone()), torch.randint(1, 32, (3, 6))

    def call(ids: Tensor, names: tuple[str, ...]) -> Tensor:
        torch.manual_seed(0)
        return model(ids, adapter_names=names)

    together = call(ids, NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(together[row], call(ids[row : row + 1], (name,))[0])
    after = torch.rand(3)
    call(ids[:1], NAMES[:1])
    assert torch.equal(torch.rand(3), after)


def test_outputs_of_another_length_for_each_row_are_refused() -> None:
    class Lengths(TimeFirst):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids)[:, : int(ids[:, 0].max())]

    model = adapted(Lengths())
    ids = torch.tensor([[3, 1, 1, 1], [3, 2, 2, 2], [2, 1, 2, 1]])
    with pytest.raises(ShapeError, match="first: .* of another length for each"):
        model(ids, adapter_names=NAMES)


def test_any_number_of_rows_with_one_adapter() -> None:
    """Packed images: so many patches for so many names."""
    model, ids = adapted(TimeFirst()), torch.randint(1, 32, (6, 5))
    model.c3a.set_adapter("two")
    expected = model(ids)
    model.c3a.set_adapter("one")
    torch.testing.assert_close(model(ids, adapter_names=["two"] * 3), expected)


def test_a_batch_that_is_not_as_named() -> None:
    model = adapted(TimeFirst())
    for n_rows in (2, 4, 6):
        with pytest.raises(ShapeError, match=rf"3 adapter names for a batch of {n_rows} rows"):
            model(torch.randint(1, 32, (n_rows, 5)), adapter_names=NAMES)


@pytest.mark.parametrize("targets", [["wpe", "c_attn"], ["c_attn"]])
def test_generation_where_a_layer_sees_no_batch(targets: list[str]) -> None:
    """Position embeddings are looked up once for all rows: the model is called for each adapter, with its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = adapted(GPT2LMHeadModel(config), targets)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with model.c3a.using(NAMES):
        together = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    for row, name in enumerate(NAMES):
        own = IDS[row : row + 1]
        with model.c3a.using([name]):
            text = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(together[row : row + 1], text), name


def test_an_encoder_that_generation_calls_by_itself() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = adapted(T5ForConditionalGeneration(config), ["q", "v", "wo"])
    with model.c3a.using(NAMES):
        together = model.generate(input_ids=IDS, max_new_tokens=4, num_beams=2, do_sample=False)
    for row, name in enumerate(NAMES):
        with model.c3a.using([name]):
            text = model.generate(input_ids=IDS[row : row + 1], max_new_tokens=4, num_beams=2, do_sample=False)
        assert torch.equal(together[row : row + 1, : text.shape[1]], text), name


def test_a_thread_of_generation_is_refused_or_told() -> None:
    model = adapted(llama())
    options = {"input_ids": IDS, "max_new_tokens": 2, "do_sample": False}
    with model.c3a.using(NAMES), ThreadPoolExecutor(1) as pool:
        expected = model.generate(**options)
        with pytest.raises(AdapterStateError, match="another thread"):
            pool.submit(model.generate, **options).result()
        run = contextvars.copy_context().run
        assert torch.equal(pool.submit(run, lambda: model.generate(**options)).result(), expected)
