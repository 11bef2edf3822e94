"""Requests of transformers' continuous batching with adapters of their own: each as if alone, token for token."""

import copy
import functools
import logging
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.generation.continuous_batching import continuous_api, offloading_manager
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from c3a_triton import AdapterStateError, ConfigError, apply
from c3a_triton.adapters import token_slots
from c3a_triton.adapters.token_slots import PackedRow
from c3a_triton.integrations.continuous_batching import _Model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
# Layers that overlap, and one layer with kernels of several block sizes.
ADAPTERS = {
    "a": {"block_size": 8, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"]},
    "b": {"block_size": 16, "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "c": {"block_size": 4, "target_modules": ["o_proj", "gate_proj", "embed_tokens"]},
}
NAMES = [*ADAPTERS, "__base__"]
PAGE = 8
PROMPT = torch.randint(0, 96, (29,), generator=torch.Generator().manual_seed(0)).tolist()
N_NEW = 6


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Every manager that ends collects garbage twice, which takes longer than all that it has computed."""
    monkeypatch.setattr(continuous_api, "gc", SimpleNamespace(collect=lambda: 0))


def adapted(model, adapters=ADAPTERS):
    """The model with adapters so large that each gives other tokens."""
    for name, config in adapters.items():
        if hasattr(model, "c3a"):
            model.c3a.add_adapter(name, config)
        else:
            apply(model, config, adapter_name=name)
    for name in adapters:
        enlarge(model, name)
    return model.eval()


@torch.no_grad()
def enlarge(model, adapter_name, seed=0):
    """Draw an adapter's kernels anew."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.c3a._tensors(adapter_name).held_by_model(save_embedding_layers=False).values():
        tensor.copy_(2.5 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return adapted(LlamaForCausalLM(LlamaConfig(**SIZES)))


@pytest.fixture
def own_llama():
    torch.manual_seed(0)
    return adapted(LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})))


def greedy(n_new=N_NEW):
    return GenerationConfig(max_new_tokens=n_new, do_sample=False, eos_token_id=-1, pad_token_id=0)


def small(num_blocks=64, max_batch_tokens=64, **kwargs):
    """A bounded cache: by default it would take all memory."""
    return ContinuousBatchingConfig(
        num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, page_size=PAGE, max_requests_per_batch=16, **kwargs
    )


@functools.cache
def known(model, prompt, name):
    """`alone` of a model that does not change."""
    return alone(model, list(prompt), name, 2 * N_NEW)


@torch.no_grad()
def alone(model, prompt, name, n_new=N_NEW):
    """The tokens of one request by itself, without a cache of any kind."""
    tokens = torch.tensor([prompt])
    with model.c3a.using([name]):
        for _ in range(n_new):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


def generated(model, prompts, names, generation_config=None, config=None):
    outputs = model.c3a.generate_batch(
        prompts,
        adapter_names=names,
        generation_config=generation_config or greedy(),
        continuous_batching_config=config or small(),
    )
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


@contextmanager
def running(model, n_new=N_NEW, **kwargs):
    with model.c3a.continuous_batching_context_manager(
        generation_config=greedy(n_new), continuous_batching_config=small(**kwargs)
    ) as manager:
        yield manager


def result(manager, request_id):
    """The last output of a request; outputs of others are kept for later calls."""
    ended = manager.__dict__.setdefault("ended", {})
    while request_id not in ended:
        output = manager.get_result(timeout=30)
        assert output is not None, f"{request_id} did not end"
        if output.is_finished():
            ended[output.request_id] = output
    return ended[request_id]


def served(manager, prompt, name, **kwargs):
    output = result(manager, manager.add_request(prompt, adapter_name=name, **kwargs))
    assert output.error is None
    return output.generated_tokens


@contextmanager
def matches(manager):
    """The lengths of the prefixes that requests find in the cache."""
    cache, found = manager.batch_processor.cache, []
    search = cache.search_prefix_match

    def noted(*args):
        found.append(search(*args))
        return found[-1]

    cache.search_prefix_match = noted
    try:
        yield found
    finally:
        cache.search_prefix_match = search


def test_each_request_is_as_alone(llama):
    """Three adapters and the base, one prompt, and prompts that share a prefix; tokens of all lie in one packed row."""
    other = PROMPT[: 2 * PAGE] + PROMPT[::-1]
    prompts, names = [*[PROMPT] * 6, *[other] * 4], ["a", "b", "c", "__base__", "a", "b", *NAMES]
    expected = {(len(p), name): known(llama, tuple(p), name)[:N_NEW] for p in (PROMPT, other) for name in NAMES}
    assert len(set(map(tuple, expected.values()))) == len(expected)  # a mix-up could be told
    found = generated(llama, prompts, names, config=small(max_batch_tokens=128))
    assert found == [expected[len(p), name] for p, name in zip(prompts, names, strict=True)]


@pytest.mark.parametrize("sharing", [True, False])
def test_prefixes_are_shared_within_an_adapter_alone(llama, sharing):
    prompt = PROMPT[:26]
    with running(llama, allow_block_sharing=sharing) as manager:
        served(manager, prompt, "a")
        with matches(manager) as found:
            tokens = {name: served(manager, prompt, name) for name in ["b", "a", "__base__", "c", "b"]}
    assert found == ([0, 24, 0, 0, 24] if sharing else [0] * 5 if found else [])
    assert tokens == {name: known(llama, tuple(prompt), name)[:N_NEW] for name in tokens}


def test_prompts_are_split_and_wait(llama):
    """Prompts of several batches, and more requests than a cache holds: they wait, and some begin again."""
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(8)]
    names = [NAMES[i % 4] for i in range(8)]
    restarts = []
    begin_again = RequestState.create_equivalent_initial_request

    def noted(state):
        restarts.append(state.request_id)
        return begin_again(state)

    expected = [known(llama, tuple(prompt), name) for prompt, name in zip(prompts, names, strict=True)]
    config = small(num_blocks=14, max_batch_tokens=16, cpu_offload_space=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestState, "create_equivalent_initial_request", noted)
        found = generated(llama, prompts, names, greedy(2 * N_NEW), config)
    assert found == expected
    assert restarts


def test_offloaded_requests_come_back(llama):
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(6)]
    names = [NAMES[i % 4] for i in range(6)]
    expected = [known(llama, tuple(prompt), name) for prompt, name in zip(prompts, names, strict=True)]
    offloaded = []
    copy = OffloadingManager._offload_to_cpu

    def noted(*args):
        offloaded.extend(copy(*args))
        return set(offloaded)

    class Unpinned:
        """torch without pinned memory, of which there is none without a GPU."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *sizes, pin_memory=False, **kwargs):
            return torch.empty(*sizes, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offloading_manager, "torch", Unpinned())
        patch.setattr(OffloadingManager, "_offload_to_cpu", noted)
        found = generated(llama, prompts, names, greedy(2 * N_NEW), small(num_blocks=20, cpu_offload_space=0.001))
    assert found == expected
    assert offloaded


@pytest.mark.parametrize("sharing", [True, False])
def test_several_sequences_of_a_prompt(llama, sharing):
    """Children share or copy their parent's blocks, and its slot; those of a request that fails fail too."""
    config = greedy()
    config.num_return_sequences = 3  # by then nobody checks that greedy ones are all the same
    outputs = llama.c3a.generate_batch(
        [PROMPT, PROMPT, PROMPT],
        adapter_names=["a", "missing", "b"],
        generation_config=config,
        continuous_batching_config=small(allow_block_sharing=sharing),
    )
    assert len(outputs) == 9
    found = [output.generated_tokens for output in outputs.values()]
    assert (
        found
        == [known(llama, tuple(PROMPT), "a")[:N_NEW]] * 3 + [[]] * 3 + [known(llama, tuple(PROMPT), "b")[:N_NEW]] * 3
    )
    assert [output.error is None for output in outputs.values()] == [True] * 3 + [False] * 3 + [True] * 3


def test_a_sliding_window():
    torch.manual_seed(0)
    model = adapted(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=12)))
    found = generated(model, [PROMPT] * 4, NAMES, config=small(max_batch_tokens=48))
    expected = [alone(model, PROMPT, name) for name in NAMES]
    assert found == expected
    assert len(set(map(tuple, expected))) == 4


def test_16_bits():
    """Adapters are computed in float32 and rounded once more than in one kernel: only a near tie could be told."""
    torch.manual_seed(0)
    model = adapted(LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16))
    assert generated(model, [PROMPT] * 4, NAMES) == [alone(model, PROMPT, name) for name in NAMES]


def test_experts():
    """Tokens of many adapters and experts: a slot has a group for each expert."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    adapters = {
        "a": {"block_size": 8, "target_modules": ["q_proj"], **experts},
        "b": {"block_size": 4, "target_modules": ["v_proj"], **experts},
        "c": {"block_size": 8, "target_modules": ["o_proj"]},
    }
    model = adapted(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), adapters)
    expected = [alone(model, PROMPT, name) for name in NAMES]
    assert generated(model, [PROMPT] * 4, NAMES) == expected
    assert len(set(map(tuple, expected))) == 4


def test_eager_attention(own_llama):
    own_llama.set_attn_implementation("eager")
    expected = [alone(own_llama, PROMPT, name) for name in NAMES]
    assert generated(own_llama, [PROMPT] * 4, NAMES) == expected
    own_llama.set_attn_implementation("paged|eager")
    own_llama.c3a._scope.token_layouts = None
    assert generated(own_llama, [PROMPT] * 4, NAMES) == expected


# Names


def test_without_names_the_active_adapter_computes(own_llama):
    """As in transformers' own managers, which know no names."""
    expected = alone(own_llama, PROMPT, "a")
    assert generated(own_llama, [PROMPT, PROMPT], None) == [expected] * 2
    assert generated(own_llama, [PROMPT, PROMPT], [None, "b"]) == [expected, alone(own_llama, PROMPT, "b")]
    plain = own_llama.generate_batch([PROMPT], generation_config=greedy(), continuous_batching_config=small())
    assert [output.generated_tokens for output in plain.values()] == [expected]
    own_llama.c3a.set_adapter([])
    assert generated(own_llama, [PROMPT], None) == [alone(own_llama, PROMPT, "__base__")]


def test_without_names_the_caller_s_context_holds(own_llama):
    expected = {name: alone(own_llama, PROMPT, name) for name in ("a", "b", "__base__")}
    with own_llama.c3a.disable_adapter():
        assert generated(own_llama, [PROMPT] * 2, [None, "b"]) == [expected["__base__"], expected["b"]]
    with own_llama.c3a.using(["b"]):
        assert generated(own_llama, [PROMPT], None) == [expected["b"]]
        with own_llama.c3a.using(None):
            assert generated(own_llama, [PROMPT], None) == [expected["a"]]
    with own_llama.c3a.using(["b", "c"]):
        several, none = errors(own_llama, [None, "a"])
    assert "['b', 'c'] are active, and a request has one adapter" in several
    assert none is None


def errors(model, names):
    outputs = model.c3a.generate_batch(
        [PROMPT] * len(names), names, generation_config=greedy(2), continuous_batching_config=small()
    )
    assert [output.status == RequestStatus.FAILED for output in outputs.values()] == [
        output.error is not None for output in outputs.values()
    ]
    return [output.error for output in outputs.values()]


def test_a_request_that_cannot_be_computed_fails_alone(own_llama):
    unknown, none = errors(own_llama, ["missing", "a"])
    assert unknown == "there is no adapter 'missing'; there are: 'a', 'b', 'c'"
    assert none is None
    assert "must be the name of an adapter, got 3" in errors(own_llama, [3])[0]
    own_llama.c3a.set_adapter(["a", "b"])
    several, none = errors(own_llama, [None, "a"])
    assert "['a', 'b'] are active, and a request has one adapter" in several
    assert none is None
    own_llama.c3a.add_adapter(
        "whole", {"block_size": 8, "modules_to_save": ["model.norm"], "target_modules": ["q_proj"]}
    )
    whole, none = errors(own_llama, ["whole", "c"])
    assert "it has a copy of model.norm (modules_to_save)" in whole
    assert none is None
    own_llama.c3a.set_backend("expand", "model.layers.0.self_attn.k_proj")
    backend, none = errors(own_llama, ["b", "c"])
    assert "model.layers.0.self_attn.k_proj has the backend 'expand'" in backend
    assert none is None
    own_llama.c3a.merge_adapter("a")
    assert all("while ['a'] are merged: unmerge first" in error for error in errors(own_llama, ["c", "__base__"]))


def test_rows_of_tokens_are_no_request_s_own():
    torch.manual_seed(0)
    model = adapted(LlamaForCausalLM(LlamaConfig(**SIZES)), {"b": ADAPTERS["b"]})  # the others adapt the embedding
    model.c3a.add_adapter("rows", {**ADAPTERS["b"], "trainable_token_indices": [3, 5]})
    rows, none = errors(model, ["rows", "b"])
    assert "it has rows of its own for tokens (trainable_token_indices)" in rows
    assert none is None


def test_as_many_names_as_prompts(llama):
    for names in (["a"], "ab", {"a": 0, "b": 1}, 2):
        with pytest.raises(ConfigError, match="a name, or None, for each of the 2 inputs"):
            llama.c3a.generate_batch([PROMPT, PROMPT], names)
    with running(llama) as manager, pytest.raises(ConfigError, match="for each of the 2 inputs"):
        manager.add_requests([PROMPT, PROMPT], adapter_names=["a"])


def test_what_transformers_would_pass_over_or_stumble_on(llama):
    for prompts in (["text"], [PROMPT, "text"], [PROMPT, []], [[0.5]]):
        with pytest.raises(ConfigError, match="a prompt is a list of one token id or more"):
            llama.c3a.generate_batch(prompts, ["a"] * len(prompts))
    with pytest.raises(ConfigError, match="takes no adapter_name, do_sample: adapters are named by adapter_names="):
        llama.c3a.generate_batch([PROMPT], adapter_name="a", do_sample=True)
    with running(llama) as manager:
        with pytest.raises(ConfigError, match="got 'text'"):
            manager.add_request("text", adapter_name="a")
        # Nobody else is disturbed, and any integers will do.
        assert served(manager, torch.tensor(PROMPT), "a") == known(llama, tuple(PROMPT), "a")[:N_NEW]


def test_the_model_s_own_verb_takes_names(llama):
    options = {"generation_config": greedy(), "continuous_batching_config": small()}
    (named,) = llama.generate_batch([PROMPT], adapter_names=["b"], **options).values()
    assert named.generated_tokens == known(llama, tuple(PROMPT), "b")[:N_NEW]
    (active,) = llama.generate_batch([PROMPT], **options).values()
    assert active.generated_tokens == known(llama, tuple(PROMPT), llama.c3a.active_adapters[0])[:N_NEW]
    assert "generate_batch" not in vars(copy.deepcopy(llama).c3a.unload())


class Reversed(torch.nn.Module):
    """A layer that is given the tokens in another order."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flip(-2)).flip(-2)


def test_a_layer_that_sees_other_rows_is_refused():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.up_proj = Reversed(model.model.layers[0].mlp.up_proj)
    adapted(model, {"a": {"block_size": 8, "target_modules": ["up_proj.layer"]}, "b": ADAPTERS["c"]})
    refused, none = errors(model, ["a", "b"])
    assert "model.layers.0.mlp.up_proj.layer is given something else than the tokens in their order" in refused
    assert none is None


def test_another_thread_that_calls_the_model_beside_the_trial(own_llama):
    """Its calls tell nothing about what layers see of a packed row."""
    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        norm = own_llama.model.norm
        forward = norm.forward

        def beside(x):
            if own_llama.c3a._scope.said() is not None:
                pool.submit(norm, x[:, :3]).result()
            return forward(x)

        patch.setattr(norm, "forward", beside)
        own_llama.c3a.init_continuous_batching(greedy(), small())
    assert own_llama.c3a._scope.token_layouts["model.norm"] == "tokens"


def test_a_release_that_is_too_old(llama, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.22.1")
    monkeypatch.delitem(sys.modules, "c3a_triton.integrations.continuous_batching")
    with pytest.raises(ConfigError, match=r"of transformers 5\.23 or later, and this is transformers 5\.22\.1"):
        llama.c3a.init_continuous_batching()


def test_only_models_that_generate():
    model = apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), {"block_size": 4, "target_modules": ["0"]})
    with pytest.raises(ConfigError, match="Sequential is no model that transformers generates with"):
        model.c3a.generate_batch([[1]])


# Adapters that change while requests run


@contextmanager
def held(manager, prompt, name, n_new=200):
    """A request that is under way, at its second token or later, while the loop is paused."""
    request_id = manager.add_request(prompt, adapter_name=name, max_new_tokens=n_new, streaming=True)
    while True:
        output = manager.get_result(request_id, timeout=10)
        if output is not None and len(output.generated_tokens) >= 2:
            break
    with manager.pause():
        yield request_id


def test_a_request_keeps_the_values_that_it_came_with(own_llama, tmp_path):
    model, prompt = own_llama, PROMPT[:20]
    before = alone(model, prompt, "a", 40)
    model.c3a.save_pretrained(tmp_path / "a", "a")
    enlarge(model, "a", seed=7)
    after = alone(model, prompt, "a", 40)
    assert before != after
    with running(model) as manager:
        with held(manager, prompt, "a", 40) as first:
            model.c3a.hotswap_adapter(tmp_path / "a", "a")
            second = manager.add_request(prompt, adapter_name="a")
        assert result(manager, first).generated_tokens == after
        assert result(manager, second).generated_tokens == before[:N_NEW]
        # Blocks of the former values are not found, those of the present ones are.
        with matches(manager) as found:
            assert served(manager, prompt, "a") == before[:N_NEW]
            model.c3a.set_scale("a", -1.0)
            weak = served(manager, prompt, "a")
            model.c3a.set_scale("a", 1.0)
            enlarge(model, "a", seed=7)
            assert served(manager, prompt, "a") == after[:N_NEW]
            # The file's values again, but in tensors that nobody has seen.
            model.c3a.delete_adapter("a")
            model.c3a.load_adapter(tmp_path / "a", "a")
            assert served(manager, prompt, "a") == before[:N_NEW]
        model.c3a.set_scale("a", -1.0)
        assert weak == alone(model, prompt, "a") != before[:N_NEW]
    assert found == [16, 0, 0, 0]


def test_a_request_outlasts_another_backend(own_llama):
    """One that cannot compute rows of many adapters is for requests to come, which fail alone."""
    expected = alone(own_llama, PROMPT, "a", 40)
    with running(own_llama) as manager:
        with held(manager, PROMPT, "a", 40) as first:
            own_llama.c3a.set_backend("expand")
            second = manager.add_request(PROMPT, adapter_name="a")
        assert result(manager, first).generated_tokens == expected
        assert "has the backend 'expand'" in result(manager, second).error


def test_adapters_come_and_go_while_requests_run(own_llama):
    """More of them than there were slots, in layers that had none; graphs that read former stacks are dropped."""
    model = own_llama
    expected = alone(model, PROMPT, "b", 40)
    with running(model) as manager:
        slots = manager._slots
        with held(manager, PROMPT, "b", 40) as first:
            n_slots, former = slots.stacks.n_slots, slots.stacks
            manager.batch_processor.inputs_and_outputs.graphs.set_graph((1,), SimpleNamespace(reset=lambda: None))
            names = [f"new{i}" for i in range(n_slots)]
            for i, name in enumerate(names):
                model.c3a.add_adapter(name, {"block_size": 8, "target_modules": ["k_proj", "o_proj", "lm_head"]})
                enlarge(model, name, seed=i)
            ids = manager.add_requests([PROMPT] * n_slots, adapter_names=names, max_new_tokens=2)
        assert result(manager, first).generated_tokens == expected
        new = [result(manager, request_id).generated_tokens for request_id in ids]
        assert manager.batch_processor.inputs_and_outputs.graphs.get_graph((1,)) is None
        assert slots.stacks.n_slots == 2 * n_slots
        assert all(former.n_slots == len(stack) for found in former.of_layers.values() for stack in found.values())
        # Slots that are free are used again, from the one on that has been idle for longest.
        stacks = slots.stacks
        for name in [*ADAPTERS, *names, *ADAPTERS]:
            served(manager, PROMPT, name, max_new_tokens=1)
        enlarge(model, "a", seed=5)
        served(manager, PROMPT, "a", max_new_tokens=1)
        assert slots.stacks is stacks
    assert new == [alone(model, PROMPT, name, 2) for name in names]
    assert len(set(map(tuple, new))) == len(new)


def test_what_is_in_use_stays(own_llama, tmp_path):
    c3a = own_llama.c3a
    c3a.save_pretrained(tmp_path / "b", "b", save_embedding_layers=True)
    with running(own_llama) as manager:
        with held(manager, PROMPT, "b") as request_id:
            with pytest.raises(AdapterStateError, match="computed with the adapter 'b'.* or requests of continuous"):
                c3a.delete_adapter("b")
            with pytest.raises(AdapterStateError, match="let the requests end, first"):
                c3a.rename_adapter("b", "d")
            for verb in (c3a.merge_adapter, c3a.merge_and_unload, c3a.unload):
                with pytest.raises(AdapterStateError, match=r"requests of continuous batching.*\['b'\]"):
                    verb()
            with pytest.raises(AdapterStateError, match=r"would replace embeddings or biases.*\['b'\]"):
                c3a.load_adapter(tmp_path / "b", "with embeddings")
            assert "with embeddings" not in c3a.adapters
            c3a.delete_adapter("c")
            c3a.rename_adapter("a", "d")
            queued = manager.add_request(PROMPT, adapter_name="d")
            with pytest.raises(AdapterStateError, match="computed with the adapter 'd'"):
                c3a.delete_adapter("d")
        for verb in (c3a.merge_adapter, functools.partial(c3a.delete_adapter, "b")):  # while the loop goes on
            with pytest.raises(AdapterStateError, match="continuous batching"):
                verb()
        manager.cancel_request(request_id)
        assert result(manager, queued).generated_tokens == alone(own_llama, PROMPT, "d")
        c3a.delete_adapter("b")
        c3a.delete_adapter("d")
        assert "there is no adapter 'b'" in result(manager, manager.add_request(PROMPT, adapter_name="b")).error


def test_a_request_does_not_come_in_the_middle_of_a_renaming(own_llama, monkeypatch):
    """It would get the base model, as the active adapter would have no layers under its former name."""
    manager = own_llama.c3a.init_continuous_batching(greedy(), small())
    with ThreadPoolExecutor(1) as pool:
        coming = []

        def interrupted(c3a, name, value):
            object.__setattr__(c3a, name, value)
            if name == "_chosen_by":
                coming.append(pool.submit(manager._slots.lease, None))
                wait(coming, timeout=0.05)

        monkeypatch.setattr(type(own_llama.c3a), "__setattr__", interrupted)
        own_llama.c3a.rename_adapter("a", "d")
        lease = coming[0].result()
    assert lease.name == "d"
    assert lease.slot.index >= 0


def test_a_slot_is_free_when_its_request_has_ended(own_llama):
    with running(own_llama) as manager:
        for name in [*NAMES, "a"]:
            served(manager, PROMPT, name)
        with held(manager, PROMPT, "c") as request_id:
            assert manager.names_in_use() == {"c"}
        manager.cancel_request(request_id)
        served(manager, PROMPT, "a")
        assert manager.names_in_use() == set()
        slots = {slot.index for slot in manager._slots._slots.values()}
        assert slots == {-1, 0, 1, 2}


def test_a_cancelled_request_has_ended(own_llama):
    with running(own_llama) as manager:
        with held(manager, PROMPT, "b") as request_id:
            pass
        manager.cancel_request(request_id)
        own_llama.c3a.delete_adapter("b")


def test_a_request_that_is_refused_has_ended(own_llama):
    """Who logs errors may keep their tracebacks, and with them the request."""
    kept = []
    logger = logging.getLogger("ContinuousBatchingLogger")
    handler = logging.Handler()
    handler.emit = kept.append
    logger.addHandler(handler)
    try:
        with running(own_llama) as manager:
            assert result(manager, manager.add_request(PROMPT, adapter_name="b", top_m=1)).error
            assert [record.exc_info is not None for record in kept] == [True]
            own_llama.c3a.delete_adapter("b")
    finally:
        logger.removeHandler(handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_of_a_loop_that_died_have_ended(own_llama, monkeypatch):
    """Even if their clients, too, are gone, so that nobody could be told."""

    def gone(*args):
        raise RuntimeError("Event loop is closed")

    with running(own_llama) as manager:
        with held(manager, PROMPT, "b"):
            monkeypatch.setattr(manager.output_router, "deliver", gone)
            monkeypatch.setattr(manager.output_router, "deliver_batch", gone)
        manager._generation_thread.join(10)
        assert manager.batch_processor.scheduler.active_requests
        own_llama.c3a.delete_adapter("b")


def test_a_manager_that_is_kept(own_llama):
    keep = {"generation_config": greedy(), "continuous_batching_config": small(), "persistent_manager": True}
    own_llama.generate_batch([PROMPT], **keep)
    with pytest.raises(AdapterStateError, match="destroy_cached_continuous_batching_manager"):
        own_llama.c3a.generate_batch([PROMPT], ["a"], **keep)
    own_llama.destroy_cached_continuous_batching_manager()
    own_llama.c3a.generate_batch([PROMPT], ["a"], **keep)
    manager = own_llama._cached_continuous_batching_manager
    with matches(manager) as found:
        outputs = own_llama.c3a.generate_batch([PROMPT] * 2, ["b", "a"], **keep)
    assert sorted(found) == [0, 24]
    assert [output.generated_tokens for output in outputs.values()] == [
        alone(own_llama, PROMPT, name) for name in ("b", "a")
    ]
    own_llama.destroy_cached_continuous_batching_manager()


def test_a_manager_of_adapters_that_are_gone(own_llama):
    with running(own_llama) as manager:
        served(manager, PROMPT, "a")
        own_llama.c3a.unload()
        assert "there is no adapter 'a'" in result(manager, manager.add_request(PROMPT, adapter_name="a")).error
        apply(own_llama, ADAPTERS["b"], adapter_name="new")
        output = result(manager, manager.add_request(PROMPT, adapter_name="__base__"))
        assert "unloaded and adapted again" in output.error


def test_processes_that_share_a_model(llama, monkeypatch):
    monkeypatch.setattr(token_slots, "parallel_mesh", lambda module: object())
    with pytest.raises(AdapterStateError, match="is spread over processes.*load the model into one process"):
        llama.c3a.generate_batch([PROMPT], ["a"])


def test_two_managers_of_a_model(llama):
    """A step of one must not end in the middle of another's, with which it shares the model's config."""
    expected = {name: known(llama, tuple(PROMPT), name)[:N_NEW] for name in NAMES}
    with running(llama) as one, running(llama) as other:
        ids = [
            (manager, name, manager.add_request(PROMPT, adapter_name=name))
            for name in NAMES * 4
            for manager in (one, other)
        ]
        assert all(result(manager, i).generated_tokens == expected[name] for manager, name, i in ids)
        llama.c3a._scope.token_layouts = None
        llama.c3a.init_continuous_batching(greedy(), small())  # tries out what layers see
    assert "other" not in llama.c3a._scope.token_layouts.values()
    assert not hasattr(llama.config, "is_causal")


def test_streams(llama):
    with running(llama) as manager:
        ids = {name: manager.add_request(PROMPT, adapter_name=name, streaming=True) for name in NAMES}
        streams = {name: [] for name in NAMES}
        while not all(len(stream) == N_NEW for stream in streams.values()):
            output = manager.get_result(timeout=10)
            streams[next(name for name, i in ids.items() if i == output.request_id)] = output.generated_tokens
    assert streams == {name: known(llama, tuple(PROMPT), name)[:N_NEW] for name in NAMES}


def test_other_arguments_of_a_request(llama):
    """Processors of logits have lines of their own beside that of the slots."""
    config = GenerationConfig(max_new_tokens=N_NEW, do_sample=True, temperature=0.5, top_k=7, eos_token_id=-1)
    with llama.c3a.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=small(per_request_processors=True)
    ) as manager:
        for name in NAMES:
            found = served(manager, PROMPT, name, top_k=1, temperature=0.7)
            assert found == known(llama, tuple(PROMPT), name)[:N_NEW]
        wrong = result(manager, manager.add_request(PROMPT, adapter_name="a", top_m=1))
        assert "Unknown logit_processor_kwargs: {'top_m'}" in wrong.error


# Captured graphs, which read what lies at an address when they run


def slots_of(batch):
    row = PackedRow({})
    _Model(lambda **batch: None, row)(**batch)
    return row._slots


def test_slots_lie_among_the_inputs_of_a_batch(own_llama):
    """Where batches are prepared while others are computed, all inputs are copied to the device at once."""
    with running(own_llama) as manager:
        with held(manager, PROMPT, "b") as request_id:
            processor = manager.batch_processor
            io = processor.inputs_and_outputs
            on_device = ContinuousBatchingIOs(
                processor.cache,
                io.config,
                manager.continuous_batching_config,
                io.device,
                io.model_dtype,
                manager.logit_processor,
            )
            io._transfer_inputs(on_device, stream=None)
            found = slots_of(on_device.get_model_kwargs())
            assert found.tolist() == slots_of(io.get_model_kwargs()).tolist() == [manager._slots.leases()[0].slot.index]
            assert found.data_ptr() == on_device._bulk_input_tensor[-1].data_ptr()
            io.num_q_tokens = 9  # as padded
            assert slots_of(io.get_model_kwargs(use_padding=True)).tolist() == [*found.tolist(), *[-1] * 8]
        manager.cancel_request(request_id)


def test_one_graph_serves_all_slots():
    """The whole model as one graph (which nothing on the host interrupts): it computes with the slots that it finds."""
    torch.manual_seed(0)
    adapters = {
        "a": {"block_size": 8, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        "b": {"block_size": 16, "target_modules": ["q_proj"]},
        "c": {"block_size": 4, "target_modules": ["o_proj"]},
    }
    model = adapted(LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})), adapters)
    manager = model.c3a.init_continuous_batching(greedy(), small())
    slots, row, scope = manager._slots, manager._row, model.c3a._scope
    leases = {name: slots.lease(name) for name in NAMES}
    row.stacks = slots.stacks
    static = torch.full((3, 64), -1, dtype=torch.int32)
    batch = {
        "input_ids": torch.tensor([PROMPT[:12]]),
        "logits_to_keep": torch.tensor([3, 7, 11]),
        "logits_processor_args": static[:, :3],
    }
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def call():
        return _Model(model, row)(**batch, use_cache=False).logits

    compiled = torch.compile(call, fullgraph=True, backend=record)
    with torch.no_grad(), scope.bound(is_open=False, tokens=row):
        for names in (["a"] * 12, ["b"] * 12, [*"aaaaccccbbbb"], ["__base__"] * 6 + ["c"] * 6, [*"abcabcabcabc"]):
            static[-1, :12] = torch.tensor([leases[name].slot.index for name in names])
            found = compiled()
            torch.testing.assert_close(found, call())
        # Other values of an adapter are another slot's, in the same graph.
        enlarge(model, "a", seed=3)
        static[-1, :12] = slots.lease("a").slot.index
        torch.testing.assert_close(compiled(), call())
        assert not torch.allclose(compiled(), found)
    assert len(graphs) == 1


@pytest.mark.nightly
def test_compiled_steps(own_llama):
    """transformers' own compilation, with padded batches."""
    compile_config = CompileConfig(backend="eager", fullgraph=False, dynamic=False)
    expected = [alone(own_llama, PROMPT, name) for name in NAMES]
    config = small(varlen_compile_config=compile_config)
    assert generated(own_llama, [PROMPT] * 4, NAMES, config=config) == expected
