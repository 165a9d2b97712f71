"""A worker's settings: one frozen struct, built once in `main`. The command line is generated from it (`cluster/cli.py`)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Meta = msgspec.Meta


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a prefill or decode worker is told. Times in seconds."""

    role: Literal["prefill", "decode"]
    nats: Annotated[str, Meta(description="URL of the NATS server, credentials included")] = "nats://127.0.0.1:4222"
    pool: Annotated[str, Meta(description="pool of workers and routers that belong together")] = "main"
    worker_id: Annotated[str, Meta(description="name of this worker; a boot nonce is added", max_length=40)] = ""
    engine: Annotated[Literal["vllm", "sim"], Meta(description="what runs the model")] = "vllm"
    model: Annotated[str, Meta(description="Hugging Face folder or id")] = "demo"
    served_name: Annotated[str, Meta(description="model name clients use; default: the model's last path part")] = ""
    transports: Annotated[
        str, Meta(description="links to try, best first, comma separated; ucx,tcp: on a GPU cuda_ipc before them")
    ] = "ucx,tcp"
    bind: Annotated[str, Meta(description="address the KV link listens on")] = "127.0.0.1"
    slots: Annotated[int, Meta(description="requests at once", ge=1, le=4096)] = 8
    block_tokens: Annotated[int, Meta(description="tokens in one KV block", ge=1, le=4096)] = 32
    kv_blocks: Annotated[int, Meta(description="KV blocks, 0: from kv_gib", ge=0)] = 0
    kv_gib: Annotated[float, Meta(description="KV cache memory of each rank in GiB (vllm)", gt=0)] = 1.0
    max_model_len: Annotated[
        int, Meta(description="prompt and output tokens of one request, 0: the model's own", ge=0)
    ] = 0
    chunk_tokens: Annotated[int, Meta(description="prompt tokens computed in one step (prefill)", ge=1)] = 512
    tp: Annotated[
        int, Meta(description="tensor-parallel ranks of the engine, each on a GPU of its own", ge=1, le=64)
    ] = 1
    dtype: Annotated[str, Meta(description="auto, float32, bfloat16 or float16")] = "auto"
    cpu_cores: Annotated[
        str,
        Meta(description="cores the engine computes on, like 0-3, or those of each rank, like 0-3|4-7 (vllm on CPU)"),
    ] = ""
    staging_mib: Annotated[
        int, Meta(description="memory for KV on its way in MiB: of the GPU, and pinned where a link needs it", ge=32)
    ] = 512
    verify_kv: Annotated[
        bool, Meta(description="digest KV once more from the GPU blocks it landed in, not only on its way there (vllm)")
    ] = False
    handoff_timeout_s: Annotated[
        float, Meta(description="KV not here by then is computed by the decode worker", gt=0)
    ] = 60.0
    grace_s: Annotated[float, Meta(description="time to finish what runs after SIGTERM", ge=0)] = 8.0
    heartbeat_s: Annotated[float, Meta(description="time between heartbeats", gt=0)] = 0.5
    hang_timeout_s: Annotated[
        float, Meta(description="an engine that makes no step for so long is started again, 0: never", ge=0)
    ] = 60.0
    sim_prefill_ms_per_token: Annotated[
        float, Meta(description="sim: time to compute one prompt token, in ms", ge=0)
    ] = 0.05
    sim_itl_ms: Annotated[float, Meta(description="sim: time of one decode step, in ms", ge=0)] = 5.0
    sim_layers: Annotated[int, Meta(description="sim: layers of KV", ge=1)] = 4
    sim_heads: Annotated[int, Meta(description="sim: KV heads", ge=1)] = 1
    sim_vocab: Annotated[
        int, Meta(description="sim: token ids 0..n-1 it makes when the model has no tokenizer", ge=2)
    ] = 32000
    metrics_port: Annotated[int, Meta(description="port of /metrics, 0: none", ge=0, le=65535)] = 0
    step_log: Annotated[
        str, Meta(description="file to append a line to for each engine step, for hocket lab fit; several may share it")
    ] = ""
    engine_args: Annotated[dict[str, object], Meta(description="passed to the engine as they are (vllm)")] = {}
