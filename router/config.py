"""A router's settings: one frozen struct, built once in `main`. The command line is generated from it (`cluster/cli.py`)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from .admission import AdmissionLimits, TenantLimits

Meta = msgspec.Meta


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a router process is told. Times in seconds."""

    nats: Annotated[str, Meta(description="URL of the NATS server, credentials included")] = "nats://127.0.0.1:4222"
    pool: Annotated[str, Meta(description="pool of workers and routers that belong together")] = "main"
    router_id: Annotated[str, Meta(description="name of this router; a boot nonce is added", max_length=40)] = ""
    host: Annotated[str, Meta(description="address the API listens on")] = "127.0.0.1"
    port: Annotated[int, Meta(description="port of the API, 0: any free one", ge=0, le=65535)] = 8000
    reuse_port: Annotated[
        bool,
        Meta(description="let other routers listen on the same port: the kernel gives each connection to one of them"),
    ] = False
    model: Annotated[str, Meta(description="folder or id of the model whose tokenizer is used")] = "demo"
    served_name: Annotated[str, Meta(description="model name clients use; default: the model's last path part")] = ""
    policy: Annotated[str, Meta(description="round_robin, least_loaded, kv, module:Class or path/to/file.py:Class")] = (
        "kv"
    )
    local_prefill_tokens_max: Annotated[
        int, Meta(description="at most so many uncached prompt tokens are computed by the decode worker itself", ge=0)
    ] = 16
    request_timeout_s: Annotated[float, Meta(description="a request that takes longer ends with an error", gt=0)] = (
        600.0
    )
    streams_max: Annotated[int, Meta(description="requests in flight; one more gets 429", ge=1)] = 4096
    body_bytes_max: Annotated[
        int, Meta(description="size of a request body, in bytes; a larger one gets 413", ge=1024)
    ] = 4 << 20
    client_backlog_bytes_max: Annotated[
        int, Meta(description="bytes kept for a client that does not read; past it the request is cancelled", ge=4096)
    ] = 256 << 10
    suspect_s: Annotated[float, Meta(description="silence after which a worker gets no new work", gt=0)] = 1.5
    dead_s: Annotated[float, Meta(description="silence after which a worker is taken as dead", gt=0)] = 3.0
    tenant_from: Annotated[
        Literal["none", "key", "header"],
        Meta(
            description="who asks: all are one; each bearer token is a tenant; or x-hocket-tenant names it and "
            "x-hocket-priority orders its requests, which a gateway in front must set or strip"
        ),
    ] = "none"
    waiting_tokens_max: Annotated[
        int, Meta(description="prompt tokens of the pool that may wait for prefill, 0: no limit", ge=0)
    ] = 0
    kv_blocks_max: Annotated[
        int,
        Meta(description="KV blocks in flight in the pool, prompts and the most that may follow, 0: no limit", ge=0),
    ] = 0
    queue_wait_max_s: Annotated[
        float, Meta(description="a prompt that would wait longer for its prefill is refused, 0: no limit", ge=0)
    ] = 0.0
    tenant_waiting_tokens_max: Annotated[
        int, Meta(description="prompt tokens of one tenant that may wait for prefill, 0: no limit", ge=0)
    ] = 0
    tenant_kv_blocks_max: Annotated[int, Meta(description="KV blocks of one tenant in flight, 0: no limit", ge=0)] = 0
    tenants: Annotated[
        dict[str, TenantLimits],
        Meta(description="tenants with limits of their own: weight, waiting_tokens_max, kv_blocks_max by name"),
    ] = {}
    lane_wait_s: Annotated[
        float,
        Meta(description="a prompt waits so long for the prefill worker it is meant for before any may take it", ge=0),
    ] = 0.5
    receipts_bytes_max: Annotated[
        int, Meta(description="memory for receipts of the newest requests (hocket explain), in bytes; 0: none", ge=0)
    ] = 16 << 20
    explains_to_clients: Annotated[
        bool, Meta(description="answer x-hocket-explain: 1 with the receipt, which names workers and their load")
    ] = True
    grace_s: Annotated[float, Meta(description="time to finish streams after SIGTERM", ge=0)] = 8.0

    def admission_limits(self) -> AdmissionLimits:
        """What the pool and its tenants may hold."""
        return AdmissionLimits(
            waiting_tokens_max=self.waiting_tokens_max,
            kv_blocks_max=self.kv_blocks_max,
            wait_max_s=self.queue_wait_max_s,
            each_tenant=TenantLimits(
                waiting_tokens_max=self.tenant_waiting_tokens_max, kv_blocks_max=self.tenant_kv_blocks_max
            ),
            tenants=self.tenants,
        )
