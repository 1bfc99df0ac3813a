# SPDX-License-Identifier: Apache-2.0
"""Our tables of vLLM's arguments, and the way that all arguments go, against vLLM's classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from disagg.advice.fit_tiers import SEEDED_AT_RANDOM
from pools.config import RESERVED_ENGINE_KWARGS, SHARED_ENGINE_KWARGS, WITHOUT_EFFECT
from pools.plan.engine_kwargs import known_engine_kwargs

CLI_ONLY = {"model_tag", "headless", "api_server_count"}
PASSED_ON = {
    *("chat_template", "chat_template_content_format", "default_chat_template_kwargs", "enable_auto_tool_choice"),
    *("enable_force_include_usage", "enable_log_deltas", "enable_log_outputs", "enable_per_request_metrics"),
    *("enable_prompt_tokens_details", "exclude_tools_when_tool_choice_none", "fingerprint_mode", "fingerprint_value"),
    *("log_error_stack", "max_log_len", "response_role", "return_tokens_as_token_ids", "tool_call_parser"),
    *("tool_parser_plugin", "tool_strict_level", "trust_request_chat_template", "trust_request_mm_kwargs"),
}
"""Arguments of vLLM's OpenAI server that clients notice in the answers of an engine, or operators in its log."""


def test_names_match_the_classes() -> None:
    """Reading the source gives the fields of AsyncEngineArgs and FrontendArgs."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    fields = {field.name for cls in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(cls)}
    assert known_engine_kwargs() == {name for name in fields if not name.startswith("_")}


def test_own_tables_name_real_arguments() -> None:
    """Arguments that are refused or must be shared exist in vLLM."""
    known = known_engine_kwargs()
    assert known is not None
    assert RESERVED_ENGINE_KWARGS.keys() - CLI_ONLY <= known
    assert known >= SHARED_ENGINE_KWARGS


def test_every_argument_of_the_server_is_decided() -> None:
    """Each is refused with what to set instead, warned of, or passed on; none is two of these, or new to us."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    names = {field.name for field in dataclasses.fields(FrontendArgs)}
    refused, warned = RESERVED_ENGINE_KWARGS.keys() & names, WITHOUT_EFFECT.keys()
    assert sorted([*refused, *warned, *PASSED_ON]) == sorted(names)


def test_the_algorithms_that_vllm_seeds_at_random() -> None:
    """They are those of which vLLM's own list says so."""
    from vllm.v1.core.kv_cache_utils import _NON_CRYPTO_HASH_FUNCTIONS

    assert {function.__name__ for function in _NON_CRYPTO_HASH_FUNCTIONS} == set(SEEDED_AT_RANDOM)


def test_the_home_of_every_argument_is_known() -> None:
    """Each argument has a class or a registry that judges it, and the class has the field that vLLM's code fills."""
    import vllm.config
    from vllm.engine.arg_utils import AsyncEngineArgs

    from pools.judge.names import is_registered
    from pools.judge.types import homes

    plain = {name for name, field in AsyncEngineArgs.__dataclass_fields__.items() if field.type in (bool, bool | None)}
    strange = {
        field.name
        for field in dataclasses.fields(AsyncEngineArgs)
        if field.name not in homes() and not is_registered(field.name) and field.name not in plain
    }
    assert len(homes()) > 200
    assert {name for name in strange if not name.startswith("data_parallel_")} <= {
        *("cudagraph_capture_sizes", "device_ids", "gdn_prefill_backend", "ir_op_priority", "kda_decode_backend"),
        *("kda_prefill_backend", "linear_backend", "mamba_cache_philox_rounds", "mamba_ssu_algorithm"),
        *("max_cudagraph_capture_size", "moe_backend", "reasoning_parser_plugin", "sparse_indexer_topk_backend"),
    }
    for owner, field in homes().values():
        assert field in vars(vllm.config)[owner].__dataclass_fields__, f"{owner}.{field}"


def test_blame() -> None:
    """Of several arguments those are named without which it goes on, one after the other; else none is."""
    from pools.judge.together import blamed

    def refuses(**pairs: object) -> list[str | None]:
        def way(given: object) -> None:
            assert isinstance(given, dict)
            if "a" in given and "b" in given:
                raise ValueError("--b-c does not go with a")
            if "c" in given:
                raise TypeError("c")
            if "always" in pairs:
                raise ValueError("no")

        return [name for name, _ in blamed(pairs, way)]

    assert refuses(x=1) == []
    assert refuses(x=1, a=1, b=1) == ["a"]
    assert refuses(c=1, a=1, b=1) == ["a", "c"]
    assert refuses(always=1, x=1) == [None]


def test_nested_arguments_are_what_the_command_line_makes_of_them() -> None:
    """A mapping becomes the class of which vLLM reads attributes before it would make one."""
    from vllm.config import ReasoningConfig, StructuredOutputsConfig

    from pools.engine.vllm_arguments import split_args

    nested = {"structured_outputs_config": {"backend": "xgrammar"}, "reasoning_config": {"reasoning_end_str": "</t>"}}
    engine_args, namespace = split_args({"model": "x", "reasoning_parser": "qwen3", **nested})
    assert isinstance(engine_args.reasoning_config, ReasoningConfig)
    assert isinstance(engine_args.structured_outputs_config, StructuredOutputsConfig)
    engine_args.create_structured_outputs_config()
    assert namespace.structured_outputs_config.reasoning_parser == "qwen3"


PLUGIN = """
from vllm.tool_parsers import ToolParser, ToolParserManager

@ToolParserManager.register_module({name!r})
class Parser(ToolParser):
    pass
"""


def test_plugins_are_loaded(tmp_path: Path) -> None:
    """A parser of a plugin's file can be found once the arguments that name the file have been split."""
    from vllm.tool_parsers import ToolParserManager

    from pools.engine.vllm_arguments import split_args

    plugin = tmp_path / "disagg_test_plugin.py"
    plugin.write_text(PLUGIN.format(name="of_a_test"))
    assert "of_a_test" not in ToolParserManager.list_registered()
    split_args({"model": "x", "tool_parser_plugin": str(plugin), "tool_call_parser": "of_a_test"})
    assert ToolParserManager.get_tool_parser("of_a_test").__name__ == "Parser"
