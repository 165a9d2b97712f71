"""Answers of a plain vLLM, no connector and nothing of ours: JSON requests on stdin, JSON answers into a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(
        job["model"], dtype="float32", enforce_eager=True, max_model_len=2048, max_num_batched_tokens=4096, block_size=32,
        enable_prefix_caching=False, kv_cache_memory_bytes=512 << 20,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": request["prompt"]} for request in job["requests"]]
    params = [SamplingParams(**request["sampling"], ignore_eos=True, logprobs=2) for request in job["requests"]]
    answers = []
    for prompt, sampling in zip(prompts, params, strict=True):
        [output] = llm.generate([prompt], [sampling], use_tqdm=False)
        choice = output.outputs[0]
        chosen = [step[token].logprob for step, token in zip(choice.logprobs, choice.token_ids, strict=True)]
        answers.append({"tokens": list(choice.token_ids), "logprobs": chosen})
    Path(sys.argv[1]).write_text(json.dumps(answers))  # vLLM prints to stdout what it likes.


if __name__ == "__main__":
    main()
