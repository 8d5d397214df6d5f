"""Quantizes a chat model while it loads, and talks.

python examples/chat.py                                  # SmolLM2-135M-Instruct at 4+2 bits, on the GPU if there is one
python examples/chat.py Qwen/Qwen2.5-7B-Instruct --bits 4
python examples/chat.py my-quantized-folder              # a checkpoint that was quantized before
python examples/chat.py --say "Hello!" --say "And now?"  # no keyboard needed
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

from turboquant_weights import TurboQuantConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--bits", default="4+2", help="4, or 4+2 with a residual plane; ignored for a quantized checkpoint")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--say", action="append", help="take this as your words instead of asking (several times)")
    arguments = parser.parse_args()

    options = {"device_map": "auto", "dtype": "auto"}
    if not hasattr(AutoConfig.from_pretrained(arguments.model), "quantization_config"):
        bits, _, residual_bits = arguments.bits.partition("+")
        options["quantization_config"] = TurboQuantConfig(int(bits), int(residual_bits or 0))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    print(f"{arguments.model}: {model.get_memory_footprint() / 1e6:.0f} MB on {model.device}. An empty line ends the chat.")

    messages: list[dict[str, str]] = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for words in arguments.say or keyboard():
        print(f"> {words}")
        messages.append({"role": "user", "content": words})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        answer = model.generate(**prompt, max_new_tokens=arguments.max_new_tokens, streamer=streamer)
        text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})


def keyboard() -> Iterable[str]:
    lines: Iterator[str] = iter(lambda: input("you: ").strip(), "")
    return lines


if __name__ == "__main__":
    main()
