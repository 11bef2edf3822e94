"""transformers around an adapted model: the Trainer, checkpointing, generation, device maps, kinds of models."""

import copy
import importlib
import io
import json
import pickle
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from safetensors import safe_open
from tiny_models import IDS, bert_classifier, gpt2, llama, llama_classifier, logits, t5, vit
from transformers import Trainer, TrainingArguments
from versions import PEFT

import c3a_triton
from c3a_triton import AdapterStateError, C3AConfig, ConfigError, load_adapter, param_groups
from c3a_triton.adapters import pretrained
from c3a_triton.integrations.transformers import SaveAdapterCallback

LLAMA = C3AConfig(block_size=4, target_modules=["q_proj", "v_proj", "down_proj"], init_weights="gaussian")
REFUSED = "model.layers.0.self_attn.q_proj.weight"  # an empty tensor, for which a plain model has another shape
SAVE_WARNING = r"model\.c3a\.save_pretrained"
# The names of checkpointing options of transformers 4 and 5, which newer versions rename.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(gradient_checkpointing|is deprecated).*:FutureWarning", f"ignore:.*{SAVE_WARNING}:UserWarning"
)


class Examples(torch.utils.data.Dataset):
    """Random examples: the same for the same index, whoever asks and in whatever order."""

    def __init__(self, model: nn.Module) -> None:
        self.kind = type(model).__name__

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        if self.kind.startswith("ViT"):
            return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % 3}
        ids = torch.randint(1, 32, (6,), generator=generator)
        return {"input_ids": ids, "labels": index % 3 if "Classification" in self.kind else ids}

    def batch(self) -> dict[str, Tensor]:
        return transformers.default_data_collator([self[index] for index in range(len(self))])


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 leaves a Trainer's mixed precision in the environment, to all Trainers that come after."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def trainer(model: nn.Module, folder: Path, *, steps: int = 4, callbacks: Any = (), **options: Any) -> Trainer:
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-1, "save_steps": 2} | options
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    optimizers = options.pop("optimizers", (None, None))
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, **quiet, **options)
    data = Examples(model)
    held_out = data if "eval_strategy" in options else None
    return Trainer(model, args, None, data, held_out, callbacks=list(callbacks), optimizers=optimizers)


def adapted(config: C3AConfig = LLAMA, base: Callable[[], nn.Module] = llama, seed: int = 0) -> Any:
    """An adapted model; the base is the same for every seed, the adapter is not."""
    model = base()
    torch.manual_seed(seed)
    return c3a_triton.apply(model, config)


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.c3a.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# The Trainer

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
ACCUMULATED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
OPTIONS = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "accumulated": ACCUMULATED,
    "checkpointed, reentrant": REENTRANT,
}


@pytest.fixture(scope="module")
def plainly_trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The adapter after the steps of the test below, without any of the Trainer's options."""
    model = adapted()
    trainer(model, tmp_path_factory.mktemp("plain"), save_strategy="no").train()
    return adapter_of(model)


@pytest.mark.parametrize(
    ("options", "only_adapter"),
    [*((options, False) for options in OPTIONS.values()), (REENTRANT, True)],
    ids=[*OPTIONS, "checkpointed, adapter only"],
)
def test_the_trainer_trains_saves_and_resumes_bit_for_bit(
    tmp_path: Path, plainly_trained: dict[str, Tensor], options: dict[str, Any], only_adapter: bool
) -> None:
    callbacks = [SaveAdapterCallback()] if only_adapter else []
    model = adapted()
    base = {name: value.clone() for name, value in model.state_dict().items() if "c3a_kernel" not in name}
    start = adapter_of(model)
    trainer(model, tmp_path, callbacks=callbacks, **options).train()
    trained = adapter_of(model)
    assert all((trained[name] - start[name]).abs().max() > 1e-2 for name in start)
    assert_same(base, {name: model.state_dict()[name] for name in base})

    # Checkpointing changes nothing, accumulating sums in another order; Adam's steps are alike in 16 bits too.
    for name, tensor in plainly_trained.items():
        difference = (trained[name] - tensor).abs()
        if "bf16" in options:
            assert difference.median() < 1e-2
        else:
            assert difference.max() < (2e-2 if options is ACCUMULATED else 1e-6)

    # Resumed from the middle, from another adapter than the one it began with.
    other = adapted(seed=1)
    trainer(other, tmp_path, callbacks=callbacks, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert_same(trained, adapter_of(other))


def test_groups_in_the_trainer_and_the_best_model(tmp_path: Path) -> None:
    config = C3AConfig(block_size=4, target_modules=["q_proj"], modules_to_save=["score"], bias="none")
    model = adapted(config, llama_classifier)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.5, head_lr=1e-2))
    job = trainer(model, tmp_path, optimizers=(optimizer, None), lr_scheduler_type="constant")
    job.train()
    assert [group["lr"] for group in job.optimizer.param_groups] == [0.5, 1e-2]
    score = model.score.modules_to_save["default"].weight
    assert 0 < (score - model.score.original_module.weight).abs().max() < 0.05


def test_the_callback_leaves_out_the_base_and_adds_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.c3a.add_adapter("other", C3AConfig(block_size=2, target_modules=["k_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(model, tmp_path, steps=2, callbacks=[SaveAdapterCallback()]).train()
    folder = tmp_path / "checkpoint-2"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{name}.c3a_kernel.default"
            for name, layer in model.c3a.layers()
            if "q_" in name or "v_" in name or "down" in name
        } | {REFUSED}
    for place in (folder, tmp_path):
        loaded = load_adapter(llama(), place)
        assert_same(loaded.c3a.state_dict(), model.c3a.state_dict())
        load_adapter(loaded, place / "other", "other")
        assert_same(loaded.c3a.state_dict("other"), model.c3a.state_dict("other"))


def test_the_callback_wants_a_model_adapted_in_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no adapters in place"):
        trainer(llama(), tmp_path, callbacks=[SaveAdapterCallback()]).train()


def test_what_is_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that is uploaded holds the adapter as PEFT's users expect it, the Trainer's card, and no base."""
    pushed: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **kwargs: Any) -> None:
            pushed.append(kwargs | {"files": {path.name for path in Path(kwargs["folder_path"]).iterdir()}})

    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    else:  # transformers 4 calls functions
        monkeypatch.setattr(transformers.trainer, "create_repo", Hub().create_repo)
        monkeypatch.setattr(transformers.trainer, "upload_folder", Hub().upload_folder)
    model = adapted()
    job = trainer(model, tmp_path / "mine", steps=2, callbacks=[SaveAdapterCallback()], hub_model_id="mine")
    job.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        job.push_to_hub()
    files = pushed[-1]["files"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files
    assert json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["peft_type"] == "C3A"
    assert not {"config.json", "model.safetensors"} & files


@pytest.mark.parametrize("only_adapter", [True, False])
def test_checkpoints_load_as_what_they_are_or_not_at_all(tmp_path: Path, only_adapter: bool) -> None:
    callbacks = [SaveAdapterCallback()] if only_adapter else []
    auto = transformers.AutoModelForCausalLM
    if PEFT:
        llama().save_pretrained(tmp_path / "base")
        model = c3a_triton.apply(auto.from_pretrained(tmp_path / "base"), LLAMA)
        trainer(model, tmp_path / "run", steps=1, callbacks=callbacks, save_steps=1).train()
        peft = importlib.import_module("peft")
        for load in (auto, type(model), peft.AutoPeftModelForCausalLM, peft.AutoPeftModel):
            loaded = load.from_pretrained(tmp_path / "run" / "checkpoint-1")
            torch.testing.assert_close(logits(loaded), logits(model.eval()), atol=1e-4, rtol=1e-4)
    # A base that nobody can find again.
    model = adapted()
    trainer(model, tmp_path / "other", steps=1, callbacks=callbacks, save_steps=1).train()
    for load in (auto.from_pretrained, type(model).from_pretrained):
        # transformers 4 looks for the base model even so, which has no name.
        with pytest.raises((RuntimeError, OSError), match="mismatch|connect|None"):
            load(tmp_path / "other" / "checkpoint-1")


@pytest.mark.parametrize("only_adapter", [True, False])
def test_save_model_writes_the_adapters(tmp_path: Path, only_adapter: bool) -> None:
    model = adapted()
    model.c3a.add_adapter("other", C3AConfig(block_size=2, target_modules=["k_proj"]))
    job = trainer(model, tmp_path, steps=1, callbacks=[SaveAdapterCallback()] if only_adapter else [])
    job.train()
    job.save_model(str(tmp_path / "final"))
    loaded = load_adapter(llama(), tmp_path / "final")
    assert_same(loaded.c3a.state_dict(), model.c3a.state_dict())
    assert_same(load_adapter(llama(), tmp_path / "final" / "other").c3a.state_dict(), model.c3a.state_dict("other"))
    assert (tmp_path / "final" / "model.safetensors").exists() == (not only_adapter)


@pytest.mark.parametrize("only_adapter", [True, False])
def test_the_best_model_comes_back(tmp_path: Path, only_adapter: bool) -> None:
    model = adapted()
    options: dict[str, Any] = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    job = trainer(model, tmp_path, callbacks=[SaveAdapterCallback()] if only_adapter else [], **options)
    job.train()
    assert job.state.best_model_checkpoint is not None
    assert_same(load_adapter(llama(), job.state.best_model_checkpoint).c3a.state_dict(), model.c3a.state_dict())


def test_an_adapter_from_a_state_dict_that_was_put_together(tmp_path: Path) -> None:
    config = C3AConfig(block_size=4, target_modules=["query"], modules_to_save=["classifier"], bias="all")
    model = c3a_triton.apply(bert_classifier(), config)
    model.c3a.add_adapter("other", C3AConfig(block_size=2, target_modules=["query"]))
    changed = {f"_fsdp_wrapped_module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    model.c3a.save_pretrained(tmp_path, state_dict=changed)
    expected = {name: tensor + 1 for name, tensor in model.c3a.state_dict().items()}
    assert_same(load_adapter(bert_classifier(), tmp_path).c3a.state_dict(), expected)


# Saving in place


class Outer(transformers.PreTrainedModel):
    """A model of transformers around a part that may be adapted."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.part = transformers.LlamaModel(config)
        self.post_init()


class Sentences(nn.Sequential):
    """As sentence-transformers' model, whose parts save themselves."""

    def save_pretrained(self, folder: Path) -> None:
        for number, module in enumerate(self):
            module.save(folder / str(number))

    def save(self, folder: Path) -> None:
        self.save_pretrained(folder)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")


class Pipeline:
    """No module itself, and of an author who says "this"."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def save_pretrained(this, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(this.part.state_dict(), folder / "pytorch_model.bin")


def outer() -> Any:
    return Outer(llama().config)


def test_saving_a_model_around_an_adapted_part_warns_as_the_model_does(tmp_path: Path) -> None:
    around = outer()
    c3a_triton.apply(around.part, C3AConfig(block_size=4, target_modules=["q_proj", "v_proj"]))
    sentences = c3a_triton.apply(Sentences(Dense(), Dense()), C3AConfig(block_size=4, target_modules=["linear"]))
    part = Sentences(Dense())
    c3a_triton.apply(part[0], C3AConfig(block_size=4, target_modules=["linear"]))
    for model, method, said in (
        (around, "save_pretrained", r"Outer that holds .*part.layers.0.self_attn.q_proj and others"),
        (copy.deepcopy(around), "save_pretrained", r"Outer that holds"),
        (sentences, "save_pretrained", r"Sentences that holds .*\(linear and"),
        (part, "save", r"Sentences that holds"),
        (Pipeline(part[0]), "save_pretrained", r"Pipeline that holds"),
    ):
        with pytest.warns(UserWarning, match=said) as told:
            getattr(model, method)(tmp_path / str(id(model)))
        assert (
            next(Path(warning.filename).name for warning in told if "that holds" in str(warning.message))
            == Path(__file__).name
        )
    around.part.c3a.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        around.save_pretrained(tmp_path / "plain")


def test_a_state_dict_of_ones_own_is_no_such_save(tmp_path: Path) -> None:
    around = outer()
    c3a_triton.apply(around.part, C3AConfig(block_size=4, target_modules=["q_proj"]))
    dense = Dense()
    c3a_triton.apply(dense, C3AConfig(block_size=4, target_modules=["linear"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        state = around.state_dict()
        torch.save(state, tmp_path / "mine.pt")
        copy.deepcopy(around).load_state_dict(torch.load(tmp_path / "mine.pt"))
        around.part.c3a.save_pretrained(tmp_path / "adapter")
        dense.save(tmp_path / "own")  # a class without from_pretrained
    assert not hasattr(state, "c3a_told")


def test_saving_in_place_warns_and_names_the_way(tmp_path: Path) -> None:
    model = adapted()
    with pytest.warns(UserWarning, match=SAVE_WARNING):
        model.save_pretrained(tmp_path / "in place")
    with safe_open(tmp_path / "in place" / "model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.q_proj.base_layer.weight" in file.keys()  # noqa: SIM118
    job = trainer(model, tmp_path / "trainer")
    with pytest.warns(UserWarning, match=SAVE_WARNING):
        job.save_model()
    # The callback makes an adapter's folder of it, which anybody can read.
    model.save_pretrained.adapter_only = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "final")
    assert {path.name for path in (tmp_path / "final").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_nothing_is_left_behind(tmp_path: Path, end: str) -> None:
    plain = llama()
    model = adapted()
    model.save_pretrained.adapter_only = True
    expected = logits(model) if end == "merge_and_unload" else logits(plain)
    model = getattr(model.c3a, end)()
    assert "save_pretrained" not in model.__dict__
    assert not model._forward_pre_hooks
    assert model.__dict__.keys() == plain.__dict__.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), expected)


def _torch_saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _torch_saved]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_saves_itself(tmp_path: Path, duplicate: Callable[[nn.Module], Any]) -> None:
    model = adapted()
    other = duplicate(model)
    assert other.save_pretrained.model is other
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.c3a_kernel["default"].fill_(7)
    with pytest.warns(UserWarning, match=SAVE_WARNING):
        other.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert (file.get_tensor("model.layers.0.self_attn.q_proj.c3a_kernel.default") == 7).all()
    other.c3a.unload()
    assert "save_pretrained" in model.__dict__


def test_a_module_trained_whole_does_not_copy_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hung on the model must not be reachable from its parts, which are deep-copied."""
    model = adapted()
    monkeypatch.setattr(type(model), "__deepcopy__", None, raising=False)  # copying the model would fail
    model.c3a.add_adapter("head", C3AConfig(block_size=2, target_modules=["k_proj"], modules_to_save=["lm_head"]))


def test_wrappers_are_not_in_the_names_of_files(tmp_path: Path) -> None:
    """Blocks that are compiled or checkpointed by torch itself."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = adapted()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    model.c3a.save_pretrained(tmp_path)
    assert_same(load_adapter(llama(), tmp_path).c3a.state_dict(), adapted().c3a.state_dict())
    model.save_pretrained.adapter_only = True
    model.save_pretrained(tmp_path / "checkpoint-1")
    with safe_open(tmp_path / "checkpoint-1" / "model.safetensors", "pt") as file:
        assert all("c3a_kernel" in key for key in set(file.keys()) - {REFUSED})


# Kinds of models

MODELS: dict[str, tuple[Callable[[], Any], C3AConfig]] = {
    "decoder": (llama, LLAMA),
    "decoder, tied": (lambda: llama(tied=True), LLAMA),
    "Conv1D": (gpt2, C3AConfig(block_size=4, target_modules=["c_attn", "c_fc"], init_weights="gaussian")),
    "encoder": (bert_classifier, C3AConfig(block_size=4, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "encoder-decoder": (t5, C3AConfig(block_size=4, target_modules=["q", "v", "wo"], init_weights="gaussian")),
    "vision": (
        vit,
        # By transformers 5's names and by 4's.
        C3AConfig(
            block_size=4, target_modules=r".*\.(q_proj|query|fc1|intermediate\.dense)", modules_to_save=["classifier"]
        ),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_trains_with_checkpointing(kind: str) -> None:
    """Every adapter gets the gradient that it has without checkpointing, the lowest one included."""
    build, config = MODELS[kind]

    def gradients(**how: bool) -> dict[str, Tensor]:
        model = adapted(config, build).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if how:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # as the Trainer does
        model(**Examples(model).batch()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    for found in (gradients(use_reentrant=True), gradients(use_reentrant=False)):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_saves_loads_and_merges(tmp_path: Path, kind: str) -> None:
    build, config = MODELS[kind]
    model = adapted(config, build).eval()
    batch = Examples(model).batch()
    plain = build().eval()
    with torch.no_grad():
        for _, layer in model.c3a.layers():
            layer.c3a_kernel["default"].normal_(std=3.0)
        before = model(**batch).logits
        size = float(before.abs().max())
        assert (before - plain(**batch).logits).abs().max() > 0.03 * size
        model.c3a.save_pretrained(tmp_path)
        loaded = load_adapter(build().eval(), tmp_path)
        torch.testing.assert_close(loaded(**batch).logits, before)
        merged = model.c3a.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, before, rtol=0, atol=1e-4 * size)
        merged.save_pretrained(tmp_path / "merged")
        again = type(merged).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(**batch).logits, before, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("decoder", {}), ("decoder", {"num_beams": 3}), ("Conv1D", {}), ("encoder-decoder", {})],
    ids=["decoder", "decoder, beams", "Conv1D", "encoder-decoder"],
)
def test_generation_with_a_cache(kind: str, how: dict[str, Any]) -> None:
    build, config = MODELS[kind]
    model = adapted(config, build).eval()
    with torch.no_grad():
        for _, layer in model.c3a.layers():
            layer.c3a_kernel["default"].normal_(std=3.0)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | how
    cached = model.generate(input_ids=IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))
    with model.c3a.disable_adapter():
        assert not torch.equal(cached, model.generate(input_ids=IDS, **options))
    merged = model.c3a.merge_and_unload()
    assert torch.equal(cached, merged.generate(input_ids=IDS, **options))


def test_a_tied_head_that_is_adapted(tmp_path: Path) -> None:
    """Both checkpoints and the adapter's file hold: the embeddings stay what they were."""
    config = C3AConfig(block_size=4, target_modules=["q_proj", "lm_head"], init_weights="gaussian")
    build = lambda: llama(tied=True)  # noqa: E731
    with pytest.warns(UserWarning, match="tied"):
        model = adapted(config, build)
    embeddings = model.model.embed_tokens.weight.clone()
    trainer(model, tmp_path).train()
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    other = adapted(config, build, seed=1)
    trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(adapter_of(model), adapter_of(other))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    model.c3a.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(build(), tmp_path / "adapter")), logits(model.eval()))


# Device maps


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("lower", ["cpu", "disk"])
def test_device_maps(tmp_path: Path, saved: Path, lower: str) -> None:
    """Layers on disk train and generate as those in memory do."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": lower, "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = transformers.LlamaForCausalLM.from_pretrained(
        saved, device_map=places, offload_folder=str(tmp_path / "offload")
    )
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    assert offloaded == (lower == "disk")
    torch.manual_seed(0)
    model = c3a_triton.apply(model, LLAMA)
    plain = adapted()
    assert_same(adapter_of(model), adapter_of(plain))
    torch.testing.assert_close(logits(model), logits(plain))
    for each in (model, plain):
        optimizer = torch.optim.SGD(param_groups(each, lr=10.0))
        for _ in range(2):
            each(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in adapter_of(plain).items():
        torch.testing.assert_close(adapter_of(model)[name], tensor)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, **options), plain.generate(input_ids=IDS, **options))
    model.c3a.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "adapter")), logits(plain))


# What the Trainer or a loss would refuse or bypass


def test_a_quantized_model_is_told_of_pefts_way(tmp_path: Path) -> None:
    model = llama()
    model.is_quantized = True
    with pytest.warns(UserWarning, match=r"Trainer trains quantized models only as PeftModel.*get_peft_model"):
        c3a_triton.apply(model, LLAMA)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted()


def _fused_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


_fused_forward.__module__ = "liger_kernel.transformers.model.llama"


def test_a_fused_loss_that_bypasses_an_adapted_head() -> None:
    head = C3AConfig(block_size=4, target_modules=["lm_head"])
    model = llama()
    model.forward = types.MethodType(_fused_forward, model)
    with pytest.warns(UserWarning, match=r"lm_head is adapted.*liger_kernel.*Leave lm_head out"):
        c3a_triton.apply(model, head)
    # Switched on later, as the Trainer does with use_liger_kernel.
    model = adapted(head).train()
    model.forward = types.MethodType(_fused_forward, model)
    with pytest.warns(UserWarning, match=r"lm_head is adapted.*liger_kernel"):
        model(input_ids=IDS, labels=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(head).train()(input_ids=IDS, labels=IDS)
        model = adapted().train()
        model.forward = types.MethodType(_fused_forward, model)
        model(input_ids=IDS, labels=IDS)


def test_models_without_transformers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    keys = set(model.__dict__)
    c3a_triton.apply(model, C3AConfig(block_size=2, target_modules=["0"]))
    assert set(model.__dict__) == keys | {"c3a"}
    assert pretrained._before_training_forward not in model._forward_pre_hooks.values()
    pretrained.release(model)


# Learning-rate groups


def names_in(model: nn.Module, group: dict[str, Any]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def test_groups_hold_every_trainable_parameter_once() -> None:
    config = C3AConfig(block_size=4, target_modules=["query"], bias="c3a_only", modules_to_save=["classifier"])
    model = adapted(config, bert_classifier)
    groups = param_groups(model, lr=0.3, weight_decay=0.1, head_lr=2e-3, head_weight_decay=0.05)
    found = [name for group in groups for name in names_in(model, group)]
    assert len(found) == len(set(found))
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kernels, heads, biases = groups
    assert (kernels["name"], kernels["lr"], kernels["weight_decay"]) == ("c3a", 0.3, 0.1)
    assert all("c3a_kernel" in name for name in names_in(model, kernels))
    assert (heads["name"], heads["lr"], heads["weight_decay"]) == ("heads", 2e-3, 0.05)
    assert names_in(model, heads) == ["classifier.modules_to_save.default.weight"]
    assert (biases["name"], biases["lr"], biases["weight_decay"]) == ("biases and norms", 2e-3, 0.0)
    assert all(name.endswith("bias") for name in names_in(model, biases))
    torch.optim.AdamW(groups)


def test_groups_without_heads_of_peft_and_of_wrappers() -> None:
    peft = pytest.importorskip("peft")
    (group,) = param_groups(adapted())
    assert (group["lr"], group["weight_decay"]) == (1e-1, 0.0)
    model = peft.get_peft_model(llama(), peft.C3AConfig(block_size=4, target_modules=["q_proj"]))
    assert all("c3a_kernel" in name for group in param_groups(model) for name in names_in(model, group))
    assert len(param_groups(model)) == 1
    compiled = torch.compile(adapted(), backend="eager")
    assert len(param_groups(compiled)[0]["params"]) == 6


def test_a_parameter_with_two_names_is_in_one_group() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    c3a_triton.apply(model, C3AConfig(block_size=2, target_modules=["0"]))
    model[2].weight = model[1].weight.requires_grad_()
    kernels, heads = param_groups(model)
    assert [len(kernels["params"]), len(heads["params"])] == [1, 1]
    assert heads["params"][0] is model[1].weight


def test_groups_of_what_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no C3A adapter.*apply"):
        param_groups(llama())
    model = adapted()
    model.c3a.set_adapter("default", inference_mode=True)
    with pytest.raises(AdapterStateError, match="frozen"):
        param_groups(model)
    with pytest.raises(ConfigError, match=r"head_lr must not be negative, got -1"):
        param_groups(adapted(), head_lr=-1)


class _Attention(nn.Module):
    """Fuses its projections in diffusers' words."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))
        self.fused_projections = False

    def fuse_projections(self) -> None:
        weights = torch.cat([self.to_q.weight.data, self.to_k.weight.data, self.to_v.weight.data])
        self.to_qkv = nn.Linear(8, 24, bias=False)
        self.to_qkv.weight.copy_(weights)
        self.fused_projections = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_projections:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out(q * k + v)


class _Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"kind": "unet"}
        self.attention = _Attention()

    def save_pretrained(self, directory: str) -> None:
        raise AssertionError("not called")

    @torch.no_grad()
    def fuse_qkv_projections(self) -> None:
        self.attention.fuse_projections()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def test_fusing_projections_of_diffusers_leaves_no_adapter_behind() -> None:
    x = torch.randn(2, 8)
    model = c3a_triton.apply(_Unet(), C3AConfig(block_size=4, target_modules=["to_q", "to_out"]))
    for other in (model, copy.deepcopy(model)):
        with pytest.raises(AdapterStateError, match=r"leave the adapter behind: call model\.c3a\.merge_and_unload"):
            other.fuse_qkv_projections()
        assert not other.attention.fused_projections
    merged = model.c3a.merge_and_unload()
    assert "fuse_qkv_projections" not in merged.__dict__
    # Of what is not fused the adapter stays.
    model = c3a_triton.apply(_Unet(), C3AConfig(block_size=4, target_modules=["to_out"]))
    model.fuse_qkv_projections()
    assert model.attention.fused_projections
    # Fused before: the layers that are left over are never called.
    model = _Unet()
    model.fuse_qkv_projections()
    c3a_triton.apply(model, C3AConfig(block_size=4, target_modules=["to_q", "to_k", "to_out"]))
    with pytest.warns(UserWarning, match=r"never called by a forward of _Unet.*: attention\.to_q, attention\.to_k"):
        model(x)
