"""One base model serving many fine-tunes: a batch in which every request has its own adapter, generated at once.

    python examples/serve_many.py --adapters 8 --requests 16

The base is a small Llama with random weights and the adapters are random too, so that nothing is downloaded: what
counts is that every request gets the text that its adapter gives it alone, and how long either way takes.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import c3a_triton
from c3a_triton import C3AConfig

PROMPT_TOKENS = 16


def base_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def with_adapters(model: LlamaForCausalLM, count: int, block_size: int) -> list[str]:
    """Give the model so many random adapters, of two block sizes, and return their names."""
    names = [f"customer{i}" for i in range(count)]
    for i, name in enumerate(names):
        config = C3AConfig(block_size=block_size // (1 + i % 2), target_modules=["q_proj", "v_proj", "down_proj"])
        if i == 0:
            c3a_triton.apply(model, config, name)
        else:
            model.c3a.add_adapter(name, config)
    for _, layer in model.c3a.layers():
        for kernel in layer.c3a_kernel.values():
            torch.nn.init.normal_(kernel)
    return names


@torch.no_grad()
def together(model: LlamaForCausalLM, prompts: Tensor, names: Sequence[str], new_tokens: int) -> Tensor:
    """All requests in one batch."""
    with model.c3a.using(names):
        return generate(model, prompts, new_tokens)


@torch.no_grad()
def one_by_one(model: LlamaForCausalLM, prompts: Tensor, names: Sequence[str], new_tokens: int) -> Tensor:
    """Each request by itself, with its adapter set."""
    texts = []
    for prompt, name in zip(prompts, names, strict=True):
        if name == "__base__":
            with model.c3a.disable_adapter():
                texts.append(generate(model, prompt[None], new_tokens))
        else:
            model.c3a.set_adapter(name, inference_mode=True)
            texts.append(generate(model, prompt[None], new_tokens))
    return torch.cat(texts)


def generate(model: LlamaForCausalLM, prompts: Tensor, new_tokens: int) -> Tensor:
    """Greedy text of exactly so many new tokens."""
    return model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )


def timed(call: Callable[..., Tensor], *args: object) -> tuple[Tensor, float]:
    """What `call` returns, and the seconds of its second run."""
    call(*args)
    start = time.perf_counter()
    result = call(*args).cpu()  # waits for a GPU
    return result, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Generate both ways, compare, and print tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8, help="how many fine-tunes there are")
    parser.add_argument("--requests", type=int, default=16, help="rows of the batch")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens generated for each request")
    parser.add_argument("--hidden", type=int, default=256, help="width of the base model, a multiple of 16")
    parser.add_argument("--layers", type=int, default=2, help="layers of the base model")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = base_model(args.hidden, args.layers)
    adapters = with_adapters(model, args.adapters, block_size=args.hidden // 4)
    model.to(device)
    names = [(*adapters, "__base__")[i % (args.adapters + 1)] for i in range(args.requests)]
    # All ask the same, so that texts differ by their adapters alone.
    prompts = torch.randint(1, 512, (1, PROMPT_TOKENS), device=device).repeat(args.requests, 1)

    batch, batch_seconds = timed(together, model, prompts, names, args.new_tokens)
    single, single_seconds = timed(one_by_one, model, prompts, names, args.new_tokens)
    if not torch.equal(batch, single):
        raise SystemExit("the batch has another text than its requests one by one")
    tokens = args.requests * args.new_tokens
    distinct = len({tuple(row) for row in batch[:, PROMPT_TOKENS:].tolist()})
    print(f"{args.requests} requests for {args.adapters} adapters and the base, {distinct} distinct texts, on {device}")
    print(f"one by one  {tokens / single_seconds:8.1f} tokens/s")
    print(f"together    {tokens / batch_seconds:8.1f} tokens/s, the same texts")


if __name__ == "__main__":
    main()
