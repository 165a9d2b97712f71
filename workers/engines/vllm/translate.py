"""Between Hocket's messages and vLLM's: sampling parameters in, step outputs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ....bus.messages import (
    FINISH_CANCELLED,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    SamplingParams,
    TokenLogprob,
)
from ..base import BadTask, StepOutput
from . import versions
from .side_channel import ReceiveEnded
from .versions import Unchecked

_FINISH = {
    None: FINISH_NONE,
    "stop": FINISH_STOP,
    "length": FINISH_LENGTH,
    "abort": FINISH_CANCELLED,
    "error": FINISH_ERROR,
}


def decode_sampling(sampling: SamplingParams, kv_params: Mapping[str, object]) -> Unchecked:
    """vLLM's parameters of a decode request. Raises BadTask for values that vLLM refuses."""
    import vllm

    try:
        return _decode_sampling(vllm.SamplingParams, sampling, kv_params)
    except versions.client_errors() as error:
        raise BadTask(str(error)) from error


def _decode_sampling(make: Unchecked, sampling: SamplingParams, kv_params: Mapping[str, object]) -> Unchecked:
    from vllm.sampling_params import RequestOutputKind

    return make(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": dict(kv_params)},
    )


def prefill_sampling(kv_params: Mapping[str, object]) -> Unchecked:
    """Only the prompt's KV is wanted: one greedy token that nobody reads."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"kv_transfer_params": dict(kv_params)},
    )


def step_output(output: Unchecked, wanted_logprobs: int | None) -> StepOutput:
    """One `RequestOutput` of a decode request; without the counts of the prompt."""
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    finish = _FINISH.get(completion.finish_reason, FINISH_ERROR)
    stop_token = None
    if finish == FINISH_STOP:
        # vLLM names the token, except for the model's own end of sequence.
        named = completion.stop_reason
        stop_token = named if isinstance(named, int) else (token_ids[-1] if token_ids else None)
    logprobs: tuple[TokenLogprob, ...] = ()
    if wanted_logprobs is not None and completion.logprobs:
        logprobs = _logprobs(token_ids, completion.logprobs, wanted_logprobs)
    return StepOutput(token_ids, finish, logprobs, stop_token)


def with_prompt_counts(
    step: StepOutput, prompt_tokens: int, end: ReceiveEnded | None, cached_tokens: int
) -> StepOutput:
    """vLLM counts what came from a peer as cached, and does not take back what did not arrive."""
    if end is None:
        return replace(step, computed_tokens=prompt_tokens - cached_tokens, cached_tokens=cached_tokens)
    # The last one runs again to make the first token.
    computed_tokens = max(1, prompt_tokens - end.valid_token)
    return replace(step, computed_tokens=computed_tokens, cached_tokens=end.first_token)


def _logprobs(token_ids: Sequence[int], positions: Sequence[Unchecked], count: int) -> tuple[TokenLogprob, ...]:
    """vLLM gives the chosen token and the `count` most likely ones in one dict a position; `rank` tells them apart."""
    entries = []
    for token_id, position in zip(token_ids, positions, strict=True):
        ranked = sorted((entry.rank, other, entry.logprob) for other, entry in position.items() if entry.rank <= count)
        top = tuple((other, logprob) for _, other, logprob in ranked[:count])
        entries.append(TokenLogprob(position[token_id].logprob, top))
    return tuple(entries)
