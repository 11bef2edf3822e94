"""diffusers' own verbs for strengths of adapters, on models into which it puts C3A by PEFT (`patch_peft`).

Beside them LoRA's layers, to which the same is done: what becomes of their scaling is what becomes of ours.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402

from c3a_triton.integrations.peft import C3ALinear, patch_peft, unpatch_peft  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
C3A = peft.C3AConfig(block_size=8, target_modules=TARGETS, init_weights=False)
LORA = peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False)
INPUTS = {
    "sample": torch.randn(2, 4, 8, 8),
    "timestep": torch.tensor([3, 400]),
    "encoder_hidden_states": torch.randn(2, 5, 16),
}


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    patch_peft()
    yield
    unpatch_peft()


def unet(config: Any = C3A) -> Any:
    torch.manual_seed(0)
    model: Any = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    for name in ("a", "b"):
        model.add_adapter(config, name)
    return model


def layers_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "scaling")}


def multiplied(**strengths: float) -> Any:
    """A model whose kernels are s · w, with both adapters active."""
    model = unet()
    model.set_adapters(["a", "b"])
    with torch.no_grad():
        for layer in layers_of(model).values():
            for name, strength in strengths.items():
                layer.c3a_kernel[name].mul_(strength)
    return model


def output(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS, **options).sample


def pipeline(model: Any) -> Any:
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_adapters_are_set_with_weights() -> None:
    model = unet()
    assert all(isinstance(layer, C3ALinear) for layer in layers_of(model).values())
    model.set_adapters(["a", "b"], [0.7, -0.3])
    assert model.active_adapters() == ["a", "b"]
    torch.testing.assert_close(output(model), output(multiplied(a=0.7, b=-0.3)))
    assert not torch.allclose(output(model), output(multiplied()), rtol=1e-3)
    model.set_adapters("a")  # of weight 1, as theirs
    assert model.active_adapters() == ["a"]
    torch.testing.assert_close(output(model), output(multiplied(b=0.0)))


def test_a_model_is_fused_with_a_scale_and_comes_back_bit_for_bit() -> None:
    model = unet()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.set_adapters(["a", "b"], [0.7, 0.3])
    model.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(output(model), output(multiplied(a=0.35, b=0.15)))
    with pytest.raises(RuntimeError, match="merged with the strength 0.35"):
        model.set_adapters(["a", "b"], [0.7, 0.3])
    model.unfuse_lora()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model.set_adapters(["a", "b"], [1.0, 1.0])
    torch.testing.assert_close(output(model), output(multiplied()))


def test_a_pipeline_sets_fuses_and_takes_back() -> None:
    pipe = pipeline(unet())
    assert pipe.get_list_adapters() == {"unet": ["a", "b"]}
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    before = output(pipe.unet)
    pipe.fuse_lora(components=["unet"], lora_scale=2.0, safe_fusing=True)
    assert pipe.num_fused_loras == 2
    torch.testing.assert_close(output(pipe.unet), output(multiplied(a=1.4, b=0.6)))
    pipe.unfuse_lora(components=["unet"])
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    assert torch.equal(output(pipe.unet), before)
    options = {"prompt_embeds": torch.randn(1, 5, 16), "negative_prompt_embeds": torch.randn(1, 5, 16)}
    image = pipe(**options, num_inference_steps=2, height=8, width=8, output_type="latent").images
    assert torch.isfinite(image).all()


def test_a_call_has_a_scale_and_its_gradient_too() -> None:
    """diffusers takes the scale back at the end of its forward, before the backward pass."""
    model, expected = unet(), unet()
    model.set_adapters(["a", "b"])
    expected.set_adapters(["a", "b"], [0.5, 0.5])
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    for one, options in ((model, scaled), (expected, {})):
        one(**INPUTS, **options).sample.square().sum().backward()
    gradients = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 * len(layers_of(model))
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    assert not torch.allclose(output(model), output(expected), rtol=1e-3)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(output(compiled, **scaled), output(expected))
    torch.testing.assert_close(output(model, cross_attention_kwargs={"scale": 0.0}), output(multiplied(a=0.0, b=0.0)))


VERBS: dict[str, Callable[[Any], Any]] = {
    "set": lambda model: model.set_adapters(["a", "b"], [0.7, 0.3]),
    "set one": lambda model: model.set_adapters("b", 2.0),
    "set by block": lambda model: model.set_adapters(["a", "b"], [{"down": 0.5, "mid": 0.1}, None]),
    "fused and back": lambda model: (model.fuse_lora(lora_scale=0.5), model.unfuse_lora()),
    "fused by name": lambda model: (
        model.set_adapters(["a", "b"]),
        model.fuse_lora(lora_scale=0.5, adapter_names=["b"]),
        model.unfuse_lora(),
    ),
    "within a call": lambda model: output(model, cross_attention_kwargs={"scale": 0.3}),
    "off and on": lambda model: (model.set_adapters("a", 0.5), model.disable_adapters(), model.enable_adapters()),
    "deleted": lambda model: (model.set_adapters(["a", "b"], [0.7, 0.3]), model.delete_adapters("a")),
}


@pytest.mark.parametrize("verb", VERBS)
def test_scaling_becomes_what_loras_becomes(verb: str) -> None:
    theirs, ours = unet(LORA), unet()
    for model in (theirs, ours):
        VERBS[verb](model)
    found = {name: dict(layer.scaling) for name, layer in layers_of(ours).items()}
    assert found == {name: dict(layer.scaling) for name, layer in layers_of(theirs).items()}
    assert ours.active_adapters() == theirs.active_adapters()
