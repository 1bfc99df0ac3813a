# SPDX-License-Identifier: Apache-2.0
"""What vLLM's verdicts on values become, what it is asked, and what is said when it does not answer. No vLLM here."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest

from disagg.advice.problems import Problem
from disagg.advice.values import ask_vllm, check_values, environment_of, question_of
from disagg.config import AppConfig
from pools.plan.verdicts import Answer, PoolArguments, Question, Verdict

MODEL, DECODE = "args.model.engine_kwargs", "args.decode.engine_kwargs"
QUESTION = Question(platform="cuda", is_local=False, pools={"decode": PoolArguments(given={"seed": 1}, added={})})


def config(model: Mapping[str, Any] | None = None, decode: Mapping[str, Any] | None = None, **more: Any) -> AppConfig:
    return AppConfig.model_validate(
        {
            "model": {"id": "m", "source": "org/m", "engine_kwargs": dict(model or {})},
            "decode": {"engine_kwargs": dict(decode or {})},
            **more,
        }
    )


def verdict(argument: str | None, kind: str, message: str = "no", loc: tuple[Any, ...] = (), **ctx: Any) -> Verdict:
    return Verdict(pool="decode", argument=argument, loc=loc, kind=kind, message=message, ctx=ctx)


def problem(given: Mapping[str, Any], *verdicts: Verdict) -> Problem:
    """The one problem of these verdicts on the decode pool's own arguments."""
    (found,) = check_values(config(decode=given), verdicts, "args")
    return found


def test_a_choice_names_what_is_allowed_and_the_nearest() -> None:
    """A value outside a Literal comes with the Literal's values; what other types of a union say is left out."""
    found = check_values(
        config({"dtype": "bf16"}),
        [
            verdict("dtype", "literal_error", loc=("literal['auto',...]",), expected="'auto', 'half' or 'bfloat16'"),
            verdict("dtype", "is_instance_of", loc=("is-instance[dtype]",)),
        ],
        "args",
    )
    assert found == [
        Problem(
            f"{MODEL}.dtype",
            "the string 'bf16' is not possible",
            "auto, half, bfloat16",
            "did you mean 'bfloat16'?",
        )
    ]


def test_a_name_of_a_registry() -> None:
    """A name that a registry lacks comes with those that it has, whatever their case; an empty one is not listed."""
    ctx = {"what": "attention backend", "names": ["", "FLASHINFER", "FLASH_ATTN"]}
    found = problem({"max_num_seqs": "flash_atn"}, verdict("max_num_seqs", "name", "unknown attention backend", **ctx))
    assert found == Problem(
        f"{DECODE}.max_num_seqs",
        "unknown attention backend",
        "FLASHINFER, FLASH_ATTN",
        "did you mean 'FLASH_ATTN'?",
    )


@pytest.mark.parametrize(
    ("value", "made", "verdicts", "path", "words"),
    [
        ({"mode": {"x": 9}}, "k", [("int_type", ("mode", "x"), {})], ".mode.x", "expected a whole number, not 9"),
        ([1, "b"], "k", [("int_parsing", (1,), {})], "[1]", "expected a whole number, not the string 'b'"),
        ({"levle": 3}, "k", [("name", ("levle",), {"what": "key", "names": ["level"]})], ".levle", "mean 'level'"),
        (3, "k", [("string_type", ("str",), {}), ("list_type", ("list",), {})], "", "allowed: a string or a list"),
        (0, "k", [("greater_than", (), {"gt": 0})], "", "0 is too small; allowed: more than 0"),
        (1.0, "k", [("less_than", (), {"lt": 1.0})], "", "1.0 is too large; allowed: less than 1"),
        (9, "k", [("enum", (), {"expected": "0, 1 or 2"})], "", "9 is not possible; allowed: 0, 1, 2"),
        ("4k", "k", [("int_parsing", (), {"written": 4000})], "", "write 4000, which is what vLLM's command line"),
        ("x", "k", [("value_error", (), {})], "", "k: not so"),
        ("x", "k", [("raised", (), {})], "", "vLLM refuses the string 'x': Value error, not so"),
        ("x.py", "k", [("absent", (), {})], "", "a file on every node"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind_in_words(value: Any, made: str, verdicts: list[Any], path: str, words: str) -> None:
    """A problem stands at the path of the very field, says what is wrong and what is allowed, and is an error."""
    given = [verdict(made, kind, "Value error, not so", loc, **ctx) for kind, loc, ctx in verdicts]
    found = problem({made: value}, *given)
    assert found.path == f"{DECODE}.{made}{path}"
    assert found.severity == "error"
    assert words in str(found)


def test_flags_are_named_as_arguments() -> None:
    """Nobody starts `vllm serve` here."""
    said = "Error: --enable-auto-tool-choice requires --tool-call-parser"
    found = problem({"max_num_seqs": 1}, verdict("max_num_seqs", "raised", said))
    assert found.message == "vLLM refuses 1: enable_auto_tool_choice requires tool_call_parser"


def test_a_module_that_is_not_here_is_a_warning() -> None:
    """A node may have what this machine cannot import."""
    found = problem({"scheduler_cls": "a.B"}, verdict("scheduler_cls", "not_importable", "No module named 'a'"))
    assert found.severity == "warning"
    assert "No module named 'a'" in found.message


def test_arguments_that_only_together_are_wrong() -> None:
    """With no single argument to blame the problem is that of all the pool's arguments."""
    found = problem({"max_num_seqs": 1}, verdict(None, "raised", "they do not fit"))
    assert (found.path, found.action) == (DECODE, "change one of them")
    (found,) = check_values(config({"seed": 1}), [verdict(None, "raised")], "args")
    assert found.path == MODEL


def test_what_both_pools_get_wrong_is_said_once() -> None:
    """A value of model.engine_kwargs is judged for each pool, and is one problem."""
    given = {"seed": "abc"}
    both = [Verdict(pool=pool, argument="seed", kind="int_parsing", message="no") for pool in ("prefill", "decode")]
    (found,) = check_values(config(given), both, "args")
    assert found.path == f"{MODEL}.seed"


def test_the_question_holds_what_an_engine_gets() -> None:
    """Each pool's own arguments over the model's, what the framework adds, and nothing that is known to be wrong."""
    given = config({"dtype": "half", "seed": "x"}, {"max_num_seqs": 8}, platform="cpu")
    question = question_of(given, {f"{MODEL}.seed"}, "args")
    assert question is not None
    assert question.pools["prefill"].given == {"dtype": "half"}
    assert question.pools["decode"].given == {"dtype": "half", "max_num_seqs": 8}
    added = question.pools["decode"].added
    assert added["model"] == "org/m"
    assert added["served_model_name"] == ["m"]
    assert added["distributed_executor_backend"] == "mp"
    assert added["enforce_eager"] is True
    assert "kv_transfer_config" not in added
    assert Question.model_validate_json(question.model_dump_json()) == question


def test_without_arguments_there_is_no_question() -> None:
    """A config that gives vLLM nothing costs no process, nor does one whose arguments are all known to be wrong."""
    assert question_of(config(), set(), "args") is None
    assert question_of(config({"seed": "x"}), {f"{MODEL}.seed"}, "args") is None


def test_only_a_model_of_this_machine_is_read(tmp_path: Any) -> None:
    """Arguments are judged together with a model only when all of it is in files here, so that nothing is fetched."""
    here = {"model": {"id": "m", "source": str(tmp_path), "engine_kwargs": {"seed": 1}}}
    draft = {"model": {"id": "m", "source": str(tmp_path), "engine_kwargs": {"speculative_config": {"model": "org/x"}}}}
    local = [question_of(AppConfig.model_validate(data), set(), "args") for data in (here, draft)]
    assert [question.is_local for question in local if question is not None] == [True, False]


def test_the_process_is_not_taken_for_an_engine() -> None:
    """It gets the environment of an engine, but for the variable by which our plugin in vLLM knows one."""
    env = environment_of(config(platform="cpu"))
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "DISAGG_ENGINE_PLATFORM" not in env


ANSWERS = "import sys; sys.stdin.read(); open(sys.argv[1], 'w').write({text!r})"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.exit('ImportError: libtorch')", "ended with code 1: ImportError: libtorch"),
        ("import time; time.sleep(60)", "took longer than 0.05 s"),
        ("pass", "gave no answer"),
        (ANSWERS.format(text="{}}"), "gave no answer"),
    ],
    ids=["ends", "hangs", "is silent", "babbles"],
)
def test_a_process_that_fails_is_told_of(script: str, words: str) -> None:
    """No answer is a reason in words, never an empty answer."""
    said = ask_vllm(
        QUESTION, {}, time_limit_s=0.05 if "sleep" in script else 30, command=(sys.executable, "-c", script)
    )
    assert isinstance(said, str)
    assert words in said


def test_an_answer_comes_back_whole() -> None:
    """The answer is read from the file that the process wrote, whatever it printed."""
    answer = Answer(verdicts=(verdict("seed", "int_parsing", loc=("a", 1), ctx_key=1),), unjudged=("this",))
    script = "print('noise');" + ANSWERS.format(text=answer.model_dump_json())
    assert ask_vllm(QUESTION, {}, command=(sys.executable, "-c", script)) == answer


def test_whoever_gives_up_waits_for_nothing() -> None:
    """A process that would go on for a minute ends at once; one that answers before is heard as ever."""
    slow = (sys.executable, "-c", "import time; time.sleep(60)")
    began = time.monotonic()
    assert ask_vllm(QUESTION, {}, command=slow, given_up=lambda: time.monotonic() - began > 0.3) == (
        "nobody waits for it any more"
    )
    assert time.monotonic() - began < 10
    answer = Answer(verdicts=(), unjudged=())
    script = "import time; time.sleep(0.5);" + ANSWERS.format(text=answer.model_dump_json())
    assert ask_vllm(QUESTION, {}, command=(sys.executable, "-c", script), given_up=lambda: False) == answer
