"""Hugging Face transformers on the same token ids, in a process of its own.

python -m csps.bench.peer_transformers reads one JSON request from stdin and prints one JSON
answer: {"ttft_s", "tbt_ms", "token_ids"}. Attention is SDPA; the KV cache is transformers' own.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def load(path: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model directory, or a GGUF file dequantised by transformers."""
    if path.is_dir():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        )
        return model.eval()
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="sdpa"
    )
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(
        {name: value.to(dtype) for name, value in state.items()}, strict=False
    )
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def run(model: transformers.PreTrainedModel, token_ids: list[int], output: int) -> dict:
    """One greedy request: prefill in one pass, then `output` tokens one by one."""
    begun = time.perf_counter()
    step = model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
    token = int(step.logits[0, -1].argmax())
    ttft_s = time.perf_counter() - begun
    drawn, gaps = [token], []
    for _ in range(output - 1):
        begun = time.perf_counter()
        step = model(torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
        token = int(step.logits[0, -1].argmax())
        gaps.append(1e3 * (time.perf_counter() - begun))
        drawn.append(token)
    return {"ttft_s": ttft_s, "tbt_ms": gaps, "token_ids": drawn}


def main() -> None:
    """Serve one request of `bench peers`."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    model = load(Path(request["path"]), getattr(torch, request["dtype"]))
    run(model, request["token_ids"][:64], 3)
    answer = run(model, request["token_ids"], request["output"])
    answer["transformers"] = transformers.__version__
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
