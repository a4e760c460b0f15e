"""HF Trainer with AdEMAMix: a small byte-level Llama learns to write like Python's standard library.

    python scripts/examples/finetune_trainer.py
    torchrun --nproc_per_node 2 scripts/examples/finetune_trainer.py
    accelerate launch --config_file launch/accelerate/fsdp2.yaml scripts/examples/finetune_trainer.py --alpha 8

All of TrainingArguments and of AdEMAMixArguments are options. Leaves with status 1 if it did not learn.
"""

import gc
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from shardopt.integrations.transformers import AdEMAMixArguments, shardopt_optimizer


@dataclass
class Task:
    text: str | None = field(default=None, metadata={"help": "A text file to learn from; default: the library."})
    model: str | None = field(default=None, metadata={"help": "A folder for from_pretrained; default: a new model."})
    block: int = field(default=64, metadata={"help": "Bytes of a sample."})


@dataclass
class Defaults(TrainingArguments):
    output_dir: str = "runs/finetune_trainer"
    max_steps: int = 150
    per_device_train_batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: float = 10
    lr_scheduler_type: str = "cosine"
    max_grad_norm: float = 0.5
    logging_steps: float = 25
    save_strategy: str = "no"
    report_to: str = "none"


def samples(task: Task) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Blocks of bytes to train on, and the last twentieth to evaluate on."""
    library = sorted(Path(os.__file__).parent.glob("[a-d]*.py"))
    text = b"\n".join(file.read_bytes() for file in ([Path(task.text)] if task.text else library))
    data = torch.tensor(list(text[: 1 << 19]))
    blocks = data[: len(data) // task.block * task.block].view(-1, task.block)
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    return rows[: -len(rows) // 20], rows[-len(rows) // 20 :][:128]


def main() -> int:
    """The status to leave with."""
    task, args, settings = HfArgumentParser((Task, Defaults, AdEMAMixArguments)).parse_args_into_dataclasses()
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=task.block,
        tie_word_embeddings=False,
    )
    train, held_out = samples(task)
    trainer = Trainer(
        model=LlamaForCausalLM.from_pretrained(task.model) if task.model else LlamaForCausalLM(config),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        optimizer_cls_and_kwargs=shardopt_optimizer(args, settings),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    untrained = torch.log(torch.tensor(256.0)).item()
    learned = loss < 0.75 * untrained
    if trainer.is_world_process_zero():
        print(f"eval loss: {untrained:.4f} -> {loss:.4f} ({'learned' if learned else 'did not learn'})")
    trainer.accelerator.end_training()  # leaves the process group
    return 0 if learned else 1


if __name__ == "__main__":
    status = main()
    gc.collect()  # the trainer is part of a cycle, and gloo's threads abort a process that they outlive
    sys.exit(status)
