"""Fine-tune a language model on a text with C3A, on one device or on several.

    python examples/train.py --model FOLDER --text FILE --output adapter
    torchrun --nproc-per-node 2 examples/train.py ...                # transformers' Trainer, data parallel
    accelerate launch --num_processes 2 examples/train.py ...        # the same
    torchrun --nproc-per-node 2 examples/train.py --plain-loop ...   # a loop of torch's own, sharded by FSDP2
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 \\
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP examples/train.py ...   # the Trainer, sharded (GPUs only)
    accelerate launch --num_processes 2 --use_deepspeed --zero_stage 3 \\
        --zero3_save_16bit_model true examples/train.py ...          # the Trainer, sharded by DeepSpeed
    torchrun --nproc-per-node 2 examples/train.py --tp 2 --plain-loop ...   # one model, spread by its plan
    torchrun --nproc-per-node 2 examples/train.py --ep 2 --plain-loop \\
        --target-parameters all-experts ...                          # the same, but each expert whole in one process

On GPUs the Trainer takes a spread model, too: without --plain-loop.

Without arguments it adapts a tiny model with random weights to Python's documentation, byte by byte, on a CPU too. The
adapter is saved in PEFT's form; `--resume` goes on from the last checkpoint in the output folder.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import corpus
import torch
import transformers
from einops import rearrange
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

import c3a_triton
from c3a_triton.integrations.transformers import SaveAdapterCallback


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of `length` tokens, one after the other."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        if len(tokens) < length:
            raise ValueError(f"the text has {len(tokens)} tokens where windows of {length} are wanted: give more text")
        windows = len(tokens) // length
        self.windows = rearrange(tokens[: windows * length], "(window position) -> window position", window=windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class C3ATrainer(transformers.Trainer):
    """The Trainer with C3A's learning-rate groups, made when the model has its final (perhaps sharded) parameters."""

    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over `c3a_triton.param_groups`; `args.learning_rate` and `args.weight_decay` are the kernels'."""
        if self.optimizer is None:
            groups = c3a_triton.param_groups(
                self.model if model is None else model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


def tiny_model(*, experts: bool = False) -> Any:
    """A byte-level Llama with random weights, or a Qwen3-MoE."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": corpus.BYTES,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if experts:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=128))


def load(args: argparse.Namespace) -> tuple[Any, Any | None]:
    """(model, tokenizer); no tokenizer means bytes."""
    options: dict[str, Any] = {}
    if args.shared_by > 1:
        # Not every transformers that has tensor parallelism knows ep_size.
        experts = {"ep_size": args.ep} if args.ep > 1 else {}
        options["distributed_config"] = DistributedConfig(tp_size=args.shared_by, **experts)
    if args.model is None:
        model = tiny_model(experts=args.target_parameters is not None)
        if options:  # models are spread as they are loaded
            model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), **options)
            model.name_or_path = ""  # no folder's
        return model, None
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **options)
    has_tokenizer = any((args.model / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return model, transformers.AutoTokenizer.from_pretrained(args.model) if has_tokenizer else None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model (default: a tiny one)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text file, or a folder of them")
    parser.add_argument("--output", type=Path, default=Path("out/train"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--block-size", default="auto", metavar="B", help='an integer, or "auto", the default')
    parser.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="default: all-linear"
    )
    parser.add_argument(
        "--target-parameters", metavar="NAME", help='parameters to adapt by themselves, such as "all-experts"'
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel over all N processes")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="besides, expert-parallel over all N processes")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="per process; default: %(default)s")
    parser.add_argument("--length", type=int, default=128, metavar="T", help="tokens per example; default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-1, help="of the C3A kernels; default: %(default)s")
    parser.add_argument("--save-steps", type=int, metavar="N", help="checkpoints; default: only at the end")
    parser.add_argument("--plain-loop", action="store_true", help="a loop of torch's own in place of the Trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    args = parser.parse_args(argv)
    if args.ep > 1 and args.model is None and args.target_parameters is None:
        parser.error(f"--ep {args.ep}: the tiny model has experts with --target-parameters all-experts")
    if args.plain_loop and (args.resume or args.save_steps):
        parser.error("--plain-loop writes no checkpoints: leave --resume and --save-steps out")
    n_processes, args.shared_by = int(os.environ.get("WORLD_SIZE", "1")), max(args.tp, args.ep)
    if not {args.tp, args.ep} <= {1, n_processes}:
        parser.error(f"--tp {args.tp}, --ep {args.ep}: all {n_processes} processes share one model, or none of them do")
    if args.shared_by > 1 and args.resume:
        parser.error("--tp and --ep: the Trainer's checkpoints of a spread model are none to go on from: no --resume")
    if args.block_size != "auto":
        if not (args.block_size.isdecimal() and int(args.block_size)):
            parser.error(f'--block-size {args.block_size}: give a positive integer or "auto"')
        args.block_size = int(args.block_size)
    return args


def train(args: argparse.Namespace) -> None:
    """Adapt and train; the adapter is saved in the output folder."""
    text = corpus.documentation() if args.text is None else b"\n".join(corpus.files_at(args.text).values())
    model, tokenizer = load(args)
    if tokenizer is None and model.config.vocab_size < corpus.BYTES:
        raise ValueError(f"--model {args.model}: no tokenizer there, and a vocabulary too small for bytes")
    targets = args.target_modules[0] if args.target_modules == ["all-linear"] else args.target_modules
    rank = 8 if args.block_size == "auto" else None  # "auto" takes the size nearest to √(in · out) / rank
    transformers.set_seed(0)  # every process begins with the same adapter
    config = c3a_triton.C3AConfig(
        block_size=args.block_size,
        rank=rank,
        target_modules=targets,
        target_parameters=args.target_parameters,
        task_type="CAUSAL_LM",
    )
    model = c3a_triton.apply(model, config)
    data = Windows(corpus.tokens_of(text, tokenizer), args.length)
    if int(os.environ.get("RANK", "0")) == 0:
        model.c3a.print_trainable_parameters()
    losses = (plain_loop if args.plain_loop else with_trainer)(model, data, args)
    if int(os.environ.get("RANK", "0")) == 0:
        (args.output / "losses.json").write_text(json.dumps(losses))
        print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; the adapter is in {args.output}")


def with_trainer(model: Any, data: Windows, args: argparse.Namespace) -> list[float]:
    """Train with transformers' Trainer; returns each step's loss."""
    on_gpu = torch.cuda.is_available() and not args.cpu
    job = C3ATrainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            gradient_checkpointing=args.gradient_checkpointing,
            save_steps=args.save_steps or args.steps,
            save_only_model=args.shared_by > 1,
            logging_steps=1,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            ddp_find_unused_parameters=False,
            report_to=[],
        ),
        train_dataset=data,
        callbacks=[SaveAdapterCallback()],  # checkpoints without the base
    )
    job.train(resume_from_checkpoint=args.resume)
    return [entry["loss"] for entry in job.state.log_history if "loss" in entry]


def plain_loop(model: Any, data: Windows, args: argparse.Namespace) -> list[float]:
    """Train with a loop of torch's own, several processes by FSDP2; returns each step's loss."""
    kind = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    rank, n_processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if args.shared_by > 1:
        rank, n_processes = 0, 1  # all processes compute the same rows
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    model.to(device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if n_processes > 1:
        # Adapters first, then sharding: the kernels are sharded with the layers that hold them.
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
        mesh = torch.distributed.init_device_mesh(kind, (n_processes,))
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(c3a_triton.param_groups(model, lr=args.lr))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(args.steps):
        # Each process draws the whole batch and takes its own rows.
        chosen = torch.randint(len(data), (n_processes * args.batch,), generator=order)[rank::n_processes]
        batch = data.windows[chosen].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if n_processes > 1:
            torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.SUM)
        losses.append(loss.item() / n_processes)
    model.c3a.save_pretrained(args.output)  # every process calls: the shards are put together
    return losses


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\b")
    try:
        train(args)
    except (OSError, ValueError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    status = main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
