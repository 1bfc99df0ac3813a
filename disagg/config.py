# SPDX-License-Identifier: Apache-2.0
"""The typed form of `args` in a Serve config file: everything that is fixed while an application runs.

Pool sizes are not here. They live in `deployments[].num_replicas`, because a change of `args` restarts every
deployment. Checks that need the machine or other files are in `disagg.advice.check`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pools.config import CpuConfig, EngineConfig, ModelConfig, Platform, PoolConfig, VllmEngineConfig
from pools.health.hang_limits import cache_blocks_s, hang_limits
from transport.config import (
    Config,
    Name,
    NixlConfig,
    NonNegativeInt,
    PositiveInt,
    Seconds,
    TransportConfig,
    refusal,
)
from transport.tiers import FsL2Config, ManagedServerConfig, OffloadConfig, SharedCacheConfig
from transport.transports import describe


class AdminConfig(Config):
    """Who may read and scale the pools over HTTP."""

    key_file: Name | None = None
    """File that holds the admin key, on every node that runs a gateway replica. Without it every /admin request
    is answered 403, so nobody can scale the pools over HTTP."""


class FileKeysConfig(Config):
    """API keys in a file, which is read again when it changes."""

    type: Literal["file"]
    """Where the keys are."""
    path: Name
    """File with a line `name:key` for each key, on every node that runs a gateway replica. The name is the tenant's; a
    tenant may have several keys. A key has at least 16 characters. Lines that begin with # are left out."""


class EnvKeysConfig(Config):
    """API keys in an environment variable."""

    type: Literal["env"]
    """Where the keys are."""
    variable: Name
    """Variable with the lines of such a file, in the environment of every gateway replica: that in which Ray was
    started."""


ApiKeysConfig = Annotated[FileKeysConfig | EnvKeysConfig, Field(discriminator="type")]
"""Where the API keys of clients are."""


PolicyName = Literal["least_loaded", "round_robin"]


class RoutingConfig(Config):
    """How the gateway chooses replicas."""

    policy: PolicyName = "least_loaded"
    """`least_loaded` goes by what this gateway replica has running on each replica, `round_robin` by turns alone."""


class CorsConfig(Config):
    """Which web pages may ask the gateway from a browser."""

    allow_origins: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Origins of these pages, such as `https://chat.example.com`; `*` for every page. A page needs an API key, too,
    where clients do."""
    allow_credentials: bool = False
    """Whether a browser sends its cookies along. Not with `*`."""
    max_age_s: NonNegativeInt = 600
    """Whole seconds for which a browser remembers the answer to its preflight request."""

    @model_validator(mode="after")
    def _credentials(self) -> Self:
        if self.allow_credentials and "*" in self.allow_origins:
            raise refusal(
                "credentials_for_every_page",
                "would let every page act as the user of the browser",
                field="allow_credentials",
                allowed="false with allow_origins: ['*']",
                action="name the origins, or remove it",
            )
        return self


class GatewayConfig(Config):
    """The deployment that clients talk to."""

    max_body_bytes: PositiveInt = 10 * 1024 * 1024
    """Largest request body in bytes; a longer one is answered 413. 10 MiB is about two million tokens of text."""
    max_incoming_bytes: PositiveInt = 256 * 1024 * 1024
    """Bytes of request bodies that one gateway replica has on their way in at the same time, until they have become
    tokens and are sent on; beyond it requests are answered 503 with Retry-After."""
    max_json_values: PositiveInt = 500_000
    """Values that one request body may have; more are answered 400. Each token id counts, each part of a chat."""
    max_chat_parts: PositiveInt = 2048
    """Messages, content parts and tool calls that one chat may have together; more are answered 400."""
    max_tools: PositiveInt = 512
    """Tools that one request may bring; more are answered 400."""
    max_field_entries: PositiveInt = 2048
    """Entries that any other list or object of a request may have, `stop`, `logit_bias` and `bad_words` among them,
    with those of the lists and objects right in it; more are answered 400. Lists of token ids have no such limit, but
    for `stop_token_ids` and `logprob_token_ids`."""
    max_num_requests: PositiveInt = 4096
    """Requests that one gateway replica carries at the same time, counted from their heads on; more are answered 503
    with Retry-After."""
    min_handoff_tokens: NonNegativeInt = 1
    """Prompts shorter than this many tokens are prefilled by the decode engine itself. 1 hands every prompt over."""
    prefill_timeout_s: Seconds = 120.0
    """Seconds that the prefill leg may take at most, retries included; `first_token_target_s` mostly ends it sooner.
    Then the decode engine prefills itself. Where both legs are sent at once it waits no longer than
    `transport.kv_lease_duration_s`, and the prefill leg is stopped after it."""
    first_token_target_s: Seconds = 30.0
    """Seconds from a request to its first token that the gateway aims at. What the decode engine is expected to take
    for the prompt, as measured, is kept back from it, half of it before anything was measured; the rest is for the
    prefill leg, retries included. A prompt that decode would compute for longer than half of it gets that time."""
    hedge_after_s: Seconds | None = None
    """Seconds after which a prefill leg that is not answered is sent to a second prefill replica as well; the first
    answer counts. It costs prefill work where the pool is slow because it is full. Unset means never. Only where the
    prefill leg comes first: with transport nixl in pull mode."""
    local_prefill_tokens: PositiveInt = 131_072
    """Prompt tokens that one decode replica may compute at a time for one gateway replica, counted from sending a
    request without a hand-off to the first byte of its answer. Any prompt fits a replica that computes none. When no
    decode replica has room, the answer is 429 with Retry-After."""
    prefill_alone_tokens: NonNegativeInt = 131_072
    """Prompt tokens that one prefill replica may compute at a time, counted in the same way, for requests that it
    answers alone because no decode replica can. 0 means that prefill replicas never do."""
    max_attempts: PositiveInt = 3
    """Replicas that one request may be lost on, or fail on with a 5xx, before it is given up, so that a request
    that breaks engines does not break them all."""
    resume_wait_s: Seconds = 60.0
    """Seconds that a stream whose decode replica was lost waits for another one to go on with it."""
    shadow_check_every: PositiveInt | None = None
    """Corruption watch: one of so many greedy answers that were made of handed-off KV is computed again without it, in
    the background on the same decode replica, and the tokens are compared. Each check costs one prompt computed on
    decode. Unset means never."""
    shadow_max_tokens: PositiveInt = 64
    """Tokens of an answer that such a check computes and compares at most."""
    connect_timeout_s: Seconds = 2.0
    """Seconds to connect to a replica before another one is tried."""
    first_byte_timeout_s: Seconds = 600.0
    """Seconds from sending the decode leg to its first byte. It covers the wait in the engine's queue."""
    idle_timeout_s: Seconds = 120.0
    """Seconds without a byte in a stream that has begun before the decode replica counts as lost."""
    body_timeout_s: Seconds = 60.0
    """Seconds that a client may take to send its request body; then it is answered 408."""
    client_stall_timeout_s: Seconds = 120.0
    """Seconds that a client may take nothing of its stream, with its buffers full, before the stream is ended."""
    retry_after_s: PositiveInt = 5
    """Whole seconds a client is told to wait, in Retry-After, when no replica is ready or has room."""
    watch_interval_s: Seconds = 1.0
    """Seconds between two questions of a gateway replica to each pool replica about its engine. One that does not
    answer twice, for 2 s each, or says that its engine hangs, gets no requests until it works again; what ran there
    goes on elsewhere."""
    probation_s: Seconds = 10.0
    """Seconds that a new replica must have been warm and well before it gets requests, while its pool is in a crash
    loop: three replicas lost within 120 s."""
    ledger_records: PositiveInt = 10_000
    """Consumed hand-offs that one gateway replica remembers for `/admin/v1/handoffs`, and as many others. The totals
    hold for all."""
    num_cpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Ray CPUs that one gateway replica reserves. Unset means 1 on cuda and 0.1 on cpu, where cores are few."""
    routing: RoutingConfig = RoutingConfig()
    """Which policy chooses replicas."""
    admin: AdminConfig = AdminConfig()
    """Who may read and scale the pools over HTTP."""
    cors: CorsConfig | None = None
    """Which web pages may ask the gateway from a browser. Unset means none."""
    api_keys: ApiKeysConfig | None = None
    """Keys that clients send as `Authorization: Bearer`. Without them anyone may send requests, which is refused where
    `http_options.host` is not a loopback address, unless `allow_anonymous` says so."""
    allow_anonymous: bool = False
    """Serve without API keys to whoever reaches `http_options.host`, e.g. because another server checks keys."""
    cache_salt: Literal["tenant", "shared"] = "tenant"
    """Whether each tenant has KV caches of its own in every tier, or all of them share what is cached. Shared, the time
    to the first token tells one tenant what another has asked."""
    salt_secret_file: Name | None = None
    """File with a secret that the tenants' salts are made of, on every node that runs a gateway replica. Without it a
    tenant's salt is made of the key, so that a new key finds nothing of what was cached with the old one."""
    max_header_bytes: PositiveInt = 16_384
    """Largest headers of a request in bytes, all together; larger ones are answered 431."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt in tokens; a longer one is answered 400. Unset means what the model takes."""
    max_prompts: PositiveInt = 256
    """Prompts that one completion request may bring as a list; more are answered 400."""
    max_stream_s: Seconds | None = None
    """Seconds that a streamed answer may take from its first byte; then it ends with an error event and `[DONE]`. Unset
    means no limit."""

    @model_validator(mode="after")
    def _hedge(self) -> Self:
        if self.hedge_after_s is not None and self.hedge_after_s >= self.prefill_timeout_s:
            raise refusal(
                "hedge_too_late",
                "has no effect: the prefill leg is over by then",
                field="hedge_after_s",
                allowed=f"less than prefill_timeout_s ({self.prefill_timeout_s:g})",
                action="lower it, or remove it",
            )
        return self

    @model_validator(mode="after")
    def _bytes(self) -> Self:
        if self.max_incoming_bytes < 2 * self.max_body_bytes:
            raise refusal(
                "no_room_for_a_body",
                "is too small for one body that is compressed",
                field="max_incoming_bytes",
                allowed=f"at least twice max_body_bytes ({self.max_body_bytes})",
                action="raise it, or lower max_body_bytes",
            )
        return self

    @model_validator(mode="after")
    def _keys(self) -> Self:
        if self.api_keys is not None and self.allow_anonymous:
            raise refusal(
                "keys_and_anonymous",
                "clients need a key, because api_keys is set",
                field="allow_anonymous",
                allowed="false with api_keys",
                action="remove one of the two",
            )
        if self.salt_secret_file is not None and (self.api_keys is None or self.cache_salt == "shared"):
            raise refusal(
                "salt_without_tenants",
                "has no effect: there are no tenants whose caches are kept apart",
                field="salt_secret_file",
                allowed="only with api_keys and cache_salt: tenant",
                action="remove it, or set them",
            )
        return self


class AppConfig(Config):
    """One application: one model, a prefill pool, a decode pool and a gateway."""

    model: ModelConfig
    """The model that both pools serve."""
    platform: Platform = "cuda"
    """What the engines compute on."""
    engine: EngineConfig = VllmEngineConfig()
    """Which engine the replicas own."""
    cpu: CpuConfig = CpuConfig()
    """What one engine takes of a machine without an accelerator."""
    transport: TransportConfig = NixlConfig()
    """How KV moves from prefill to decode."""
    offload: OffloadConfig | None = None
    """Host memory that keeps KV which falls out of an engine's own memory. Unset means none."""
    shared_cache: SharedCacheConfig | None = None
    """Cache that all replicas share and that outlives them. Unset means none."""
    prefill: PoolConfig = PoolConfig()
    """The prefill pool."""
    decode: PoolConfig = PoolConfig()
    """The decode pool."""
    gateway: GatewayConfig = GatewayConfig()
    """The deployment that clients talk to."""
    engine_key_file: Name | None = None
    """File with the key that the engines' private HTTP asks for, on every node. Unset means a random one for each
    replica, which only the gateways know; set it to ask an engine by hand."""

    @model_validator(mode="after")
    def _cross_fields(self) -> Self:
        if self.platform == "cuda" and self.cpu != CpuConfig():
            raise PydanticCustomError(
                "cpu_settings_on_cuda",
                "cpu settings have no effect with platform: cuda; remove cpu or set platform: cpu",
            )
        for where, kwargs in self._engine_kwargs().items():
            if self.platform == "cpu" and "worker_extension_cls" in kwargs:
                raise PydanticCustomError(
                    "worker_extension_on_cpu",
                    "{where} sets worker_extension_cls, which platform: cpu needs for its own; remove it",
                    {"where": where},
                )
        disk = self.offload.disk.path if self.offload and self.offload.disk else None
        server = self.shared_cache.server if self.shared_cache else None
        for index, l2 in enumerate(server.l2 if isinstance(server, ManagedServerConfig) else ()):
            if isinstance(l2, FsL2Config) and l2.path == disk:
                raise refusal(
                    "same_directory",
                    f"{disk!r} is the directory of offload.disk already",
                    field=f"shared_cache.server.l2[{index}].path",
                    allowed="a directory of its own",
                    action="change one of them",
                )
        self._check_cache_timeout()
        transport = describe(self.transport)
        if self.gateway.hedge_after_s is not None and (limit := transport.limits.get("hedging")) is not None:
            raise refusal(
                "hedge_refused",
                limit.message,
                field="gateway.hedge_after_s",
                allowed=f"null with transport {transport.name}",
                action="remove it, or use transport nixl in pull mode",
            )
        if self.gateway.connect_timeout_s >= self.transport.kv_lease_duration_s:
            raise PydanticCustomError(
                "lease_too_short",
                "transport.kv_lease_duration_s ({lease} s) must exceed gateway.connect_timeout_s ({connect} s), "
                "or KV expires while the gateway tries one dead replica",
                {"lease": self.transport.kv_lease_duration_s, "connect": self.gateway.connect_timeout_s},
            )
        return self

    def _check_cache_timeout(self) -> None:
        """A scheduler blocked by a server that does not answer must not look like an engine that hangs."""
        if self.shared_cache is None:
            return
        blocked_s = cache_blocks_s(self.shared_cache)
        blocks = (
            f"a server that does not answer can block an engine's scheduler for {self.shared_cache.mq_timeout_s:g} s "
            "(shared_cache.mq_timeout_s), twice before it is noticed"
        )
        for name, pool in {"prefill": self.prefill, "decode": self.decode}.items():
            limits = hang_limits(pool, self.shared_cache)
            if limits.suspect_s <= blocked_s:
                raise refusal(
                    "cache_timeout",
                    f"{blocks}; healthy replicas would be suspect after {limits.suspect_s:g} s",
                    field=f"{name}.hang_after_s",
                    allowed=f"more than {blocked_s:g}, or unset",
                    action="raise or remove it, or lower shared_cache.mq_timeout_s",
                )
            if limits.replace_s <= limits.suspect_s:
                raise refusal(
                    "cache_timeout",
                    f"{blocks}; healthy replicas would be replaced after {limits.replace_s:g} s",
                    field=f"{name}.health_probe_timeout_s",
                    allowed=f"more than {limits.suspect_s:g} ({name}.hang_after_s), or unset",
                    action="raise or remove it, or lower shared_cache.mq_timeout_s",
                )

    def _engine_kwargs(self) -> dict[str, dict[str, Any]]:
        return {
            "model.engine_kwargs": self.model.engine_kwargs,
            "prefill.engine_kwargs": self.prefill.engine_kwargs,
            "decode.engine_kwargs": self.decode.engine_kwargs,
        }

    @property
    def gateway_num_cpus(self) -> float:
        """Ray CPUs that one gateway replica reserves."""
        if self.gateway.num_cpus is not None:
            return self.gateway.num_cpus
        return 0.1 if self.platform == "cpu" else 1.0
