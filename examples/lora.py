"""Trains a LoRA on a model in 4 bits, saves and reloads it, and merges it, in both ways that there are.

    python examples/lora.py                                  # SmolLM2-135M, on a page of text that comes with the package
    python examples/lora.py Qwen/Qwen2.5-7B --text my.txt --steps 500 --output my-adapter

The base model stays in 4 bits throughout. Nothing has to be registered: PEFT finds quantized layers like any linear layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from turboquant_weights import TurboQuantConfig, load, merge_report, quantize_model, save
from turboquant_weights.evaluation import sample_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M", help="hub id or folder of a dense model")
    parser.add_argument("--text", type=Path, help="what to learn")
    parser.add_argument("--output", type=Path, default=Path("lora-output"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=128, help="tokens of one example")
    parser.add_argument("--bits", type=int, nargs=2, default=(4, 0), metavar=("BASE", "RESIDUAL"))
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    # 1. Quantize while loading, and keep the base: an adapter belongs to one base, bit for bit.
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    config = TurboQuantConfig(*arguments.bits)
    options = dict(device_map="auto", dtype=torch.bfloat16 if on_gpu else torch.float32)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config, **options)
    save(model, arguments.output / "base", tokenizer=tokenizer, overwrite=True)

    # 2. Put an adapter on every linear layer and train it.
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else sample_text()
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    examples = [{"input_ids": part, "labels": part} for part in tokens.split(arguments.length)[:-1]]
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.print_trainable_parameters()
    before = loss(adapted, examples)
    settings = TrainingArguments(
        output_dir=str(arguments.output / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        gradient_checkpointing=True,
        bf16=on_gpu,
        logging_steps=max(1, arguments.steps // 5),
        save_strategy="no",
        report_to=[],
    )
    Trainer(model=adapted, args=settings, train_dataset=examples).train()
    after = loss(adapted, examples)
    print(f"loss on what it learned: {before:.4f} before, {after:.4f} after")

    # 3. The adapter alone is a few megabytes. Reloaded onto the same base, it does the same.
    adapted.save_pretrained(arguments.output / "adapter")
    again = PeftModel.from_pretrained(load(arguments.output / "base", **options), arguments.output / "adapter")
    print(f"reloaded: {loss(again, examples):.4f}")

    # 4. Merged into the planes, which are rounded again: updates smaller than the rounding are lost, and the report says so.
    merged = again.merge_and_unload()
    print(merge_report(merged))
    print(f"merged into {config.label} bits: {loss(merged, examples):.4f}")

    # 5. Merged into the original model, which is then quantized: what was learned stays. One checkpoint again.
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
    fresh = PeftModel.from_pretrained(dense, arguments.output / "adapter").merge_and_unload()
    quantize_model(fresh, config)
    print(f"merged into the original, then quantized: {loss(fresh, examples):.4f}")
    save(fresh, arguments.output / "merged", tokenizer=tokenizer, overwrite=True)


@torch.no_grad()
def loss(model: Any, examples: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    some = examples[:16]  # enough to see a difference
    losses = [model(**{key: value[None].to(model.device) for key, value in e.items()}).loss.item() for e in some]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
