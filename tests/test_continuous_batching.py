"""Requests of transformers' continuous batching with adapters of their own: each as if it were alone, token for token."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from transformers import (
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
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from c3a_triton import AdapterStateError, ConfigError, apply

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
PROMPT = torch.randint(0, 96, (37,), generator=torch.Generator().manual_seed(0)).tolist()
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
    return adapted(LlamaForCausalLM(LlamaConfig(**SIZES)))


def greedy(n_new=N_NEW):
    return GenerationConfig(max_new_tokens=n_new, do_sample=False, eos_token_id=-1, pad_token_id=0)


def small(num_blocks=64, max_batch_tokens=64, **kwargs):
    """A bounded cache: by default it would take all memory."""
    return ContinuousBatchingConfig(
        num_blocks=num_blocks, max_batch_tokens=max_batch_tokens, page_size=PAGE, max_requests_per_batch=16, **kwargs
    )


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
    expected = {(len(p), name): alone(llama, p, name) for p in (PROMPT, other) for name in NAMES}
    assert len(set(map(tuple, expected.values()))) == len(expected)  # a mix-up could be told
    found = generated(llama, prompts, names, config=small(max_batch_tokens=128))
    assert found == [expected[len(p), name] for p, name in zip(prompts, names, strict=True)]


@pytest.mark.parametrize("sharing", [True, False])
def test_prefixes_are_shared_within_an_adapter_alone(llama, sharing):
    prompt = PROMPT[:30]
    with running(llama, allow_block_sharing=sharing) as manager:
        served(manager, prompt, "a")
        with matches(manager) as found:
            tokens = {name: served(manager, prompt, name) for name in ["b", "a", "__base__", "c", "b"]}
    assert found == ([0, 24, 0, 0, 24] if sharing else [0] * 5 if found else [])
    assert tokens == {name: alone(llama, prompt, name) for name in tokens}


def test_prompts_are_split_and_wait(llama):
    """Prompts of several batches, and more requests than a cache holds: they wait, and some begin again."""
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(8)]
    names = [NAMES[i % 4] for i in range(8)]
    restarts = []
    begin_again = RequestState.create_equivalent_initial_request

    def noted(state):
        restarts.append(state.request_id)
        return begin_again(state)

    expected = [alone(llama, prompt, name, 12) for prompt, name in zip(prompts, names, strict=True)]
    config = small(num_blocks=14, max_batch_tokens=16, cpu_offload_space=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestState, "create_equivalent_initial_request", noted)
        found = generated(llama, prompts, names, greedy(12), config)
    assert found == expected
    assert restarts


def test_offloaded_requests_come_back(llama):
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(6)]
    names = [NAMES[i % 4] for i in range(6)]
    expected = [alone(llama, prompt, name, 12) for prompt, name in zip(prompts, names, strict=True)]
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
        found = generated(llama, prompts, names, greedy(12), small(num_blocks=20, cpu_offload_space=0.001))
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
    assert found == [alone(llama, PROMPT, "a")] * 3 + [[]] * 3 + [alone(llama, PROMPT, "b")] * 3
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


def test_as_many_names_as_prompts(llama):
    for names in (["a"], "ab"):
        with pytest.raises(ConfigError, match="a name, or None, for each of the 2 inputs"):
            llama.c3a.generate_batch([PROMPT, PROMPT], names)
    with running(llama) as manager, pytest.raises(ConfigError, match="for each of the 2 inputs"):
        manager.add_requests([PROMPT, PROMPT], adapter_names=["a"])


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


def test_only_models_that_generate():
    model = apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), {"block_size": 4, "target_modules": ["0"]})
    with pytest.raises(ConfigError, match="Sequential is no model that transformers generates with"):
        model.c3a.generate_batch([[1]])


# Adapters that change while requests run


@contextmanager
def held(manager, prompt, name, n_new=60):
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
    before = alone(model, prompt, "a", 30)
    model.c3a.save_pretrained(tmp_path / "a", "a")
    enlarge(model, "a", seed=7)
    after = alone(model, prompt, "a", 30)
    assert before != after
    with running(model) as manager:
        with held(manager, prompt, "a", 30) as first:
            model.c3a.hotswap_adapter(tmp_path / "a", "a")
            second = manager.add_request(prompt, adapter_name="a", max_new_tokens=30)
        assert result(manager, first).generated_tokens == after
        assert result(manager, second).generated_tokens == before
        # Blocks of the former values are not found, those of the present ones are.
        with matches(manager) as found:
            assert served(manager, prompt, "a", max_new_tokens=30) == before
            enlarge(model, "a", seed=7)
            assert served(manager, prompt, "a", max_new_tokens=30) == after
            # The file's values again, but in tensors that nobody has seen.
            model.c3a.delete_adapter("a")
            model.c3a.load_adapter(tmp_path / "a", "a")
            assert served(manager, prompt, "a", max_new_tokens=30) == before
    assert found == [16, 0, 0]


def test_adapters_come_and_go_while_requests_run(own_llama, tmp_path):
    """More adapters than there were slots, in layers that had none; and the least recently used slots are used again."""
    model, expected = own_llama, {name: alone(own_llama, PROMPT, name, 30) for name in NAMES}
    with running(model) as manager, held(manager, PROMPT, "b", 30) as first:
        slots = manager._slots
        n_slots = slots.n_slots
        for i in range(2 * n_slots):
            config = {"block_size": 8, "target_modules": ["k_proj", "o_proj"]}
            model.c3a.add_adapter(f"new{i}", config)
            enlarge(model, f"new{i}", seed=i)
        names = [name for name in model.c3a.adapters if name.startswith("new")]
        ids = manager.add_requests([PROMPT] * len(names), adapter_names=names, max_new_tokens=4)
        assert slots.n_slots > n_slots
        # (the pause ends)
        del ids
    new = {name: alone(model, PROMPT, name, 4) for name in names}
    assert len(set(map(tuple, new.values()))) == len(new)
    assert first


def test_what_is_in_use_stays(own_llama, tmp_path):
    c3a = own_llama.c3a
    c3a.save_pretrained(tmp_path / "b", "b")
    with running(own_llama) as manager:
        with held(manager, PROMPT, "b") as request_id:
            with pytest.raises(AdapterStateError, match="computed with the adapter 'b'.* or requests of continuous"):
                c3a.delete_adapter("b")
            with pytest.raises(AdapterStateError, match="let the requests end, first"):
                c3a.rename_adapter("b", "d")
            for verb in (c3a.merge_adapter, c3a.merge_and_unload, c3a.unload):
                with pytest.raises(AdapterStateError, match=r"requests of continuous batching.*\['b'\]"):
                    verb()
            c3a.delete_adapter("c")
            c3a.rename_adapter("a", "d")
            queued = manager.add_request(PROMPT, adapter_name="d")
            with pytest.raises(AdapterStateError, match="computed with the adapter 'd'"):
                c3a.delete_adapter("d")
        manager.cancel_request(request_id)
        assert result(manager, queued).generated_tokens == alone(own_llama, PROMPT, "d")
        c3a.delete_adapter("b")
        c3a.delete_adapter("d")
        assert "there is no adapter 'b'" in result(manager, manager.add_request(PROMPT, adapter_name="b")).error


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
    assert sorted(found) == [0, 32]
    assert [output.generated_tokens for output in outputs.values()] == [
        alone(own_llama, PROMPT, name) for name in ("b", "a")
    ]
    own_llama.destroy_cached_continuous_batching_manager()


def test_streams(llama):
    with running(llama) as manager:
        ids = {name: manager.add_request(PROMPT, adapter_name=name, streaming=True) for name in NAMES}
        streams = {name: [] for name in NAMES}
        while not all(len(stream) == N_NEW for stream in streams.values()):
            output = manager.get_result(timeout=10)
            streams[next(name for name, i in ids.items() if i == output.request_id)] = output.generated_tokens
    assert streams == {name: alone(llama, PROMPT, name) for name in NAMES}
