"""Tiny checkpoints, their logits in vLLM and in Transformers."""

import contextlib
import gc
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # by default almost all memory
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, where a test can look at it
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

import turboquant_weights

PROMPT = [1, 5, 9, 77, 33, 2, 96, 64, 41, 8, 8, 90]
COMMON = dict(
    vocab_size=97,
    hidden_size=96,  # three blocks of 32
    intermediate_size=160,  # five: two ranks share one
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


def random_model(kind: str, **settings):
    """A random ``Llama``, ``Qwen2``, ... in float32; biases and norms are random too."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model.eval()


@contextlib.contextmanager
def engine(folder, **options):
    """A vLLM engine of the folder, in this process unless it needs several."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = dict(
        dtype="float32",
        max_model_len=64,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
    )
    llm = LLM(model=str(folder), **{**defaults, **options})
    try:
        yield llm
    finally:
        with contextlib.suppress(AttributeError):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def logits_of(llm, prompt=PROMPT) -> torch.Tensor:
    """[tokens, vocabulary] of the prompt's next tokens, and of three more that are decoded one by one."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    (result,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    rows = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows]), result.outputs[0].token_ids


def serve(folder, prompt=PROMPT, **options):
    with engine(folder, **options) as llm:
        return logits_of(llm, prompt)


@torch.no_grad()
def reference(folder, tokens, prompt=PROMPT, **options) -> torch.Tensor:
    """The same logits in Transformers, for the prompt and the tokens that vLLM chose."""
    model = turboquant_weights.load(folder, dtype=torch.float32, **options)
    return model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0]
