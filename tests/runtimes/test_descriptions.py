"""Runtimes as data: what they serve, and that one function gives the flags for a process and for a container."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowbit.core.errors import RecipeError
from lowbit.core.scheme import ActivationScheme, Scheme, WeightScheme
from lowbit.runtimes import RUNTIMES, get_runtime
from lowbit.runtimes.artifact import Artifact, label
from lowbit.runtimes.bnb_variables import from_variables, to_variables
from lowbit.runtimes.description import BitsAndBytes, ServeOptions

GPTQ = Artifact("/home/me/llama-w4", "llama-w4", "gptq", ("w4a16",), "llama", 4096)
REMOVED = {"--swap-space", "--task", "--disable-log-requests", "--quantization", "--dtype"}


def test_the_same_flags_for_a_process_and_a_container() -> None:
    for name in RUNTIMES.names():
        runtime = get_runtime(name)
        options = ServeOptions(port=runtime.port, context=2048, device="cuda")
        local = runtime.argv(GPTQ, options, program=("started-here",))
        inside = runtime.argv(replace(GPTQ, location="/models/llama-w4"), replace(options, host="0.0.0.0"), program=())
        assert local[0] == "started-here"
        translated = [{GPTQ.location: "/models/llama-w4", "127.0.0.1": "0.0.0.0"}.get(word, word) for word in local[1:]]
        assert inside == translated
        assert str(runtime.port) in inside


def test_vllm_gets_no_flag_that_it_works_out_itself_or_has_lost() -> None:
    for device in ("cpu", "cuda"):
        argv = get_runtime("vllm").argv(GPTQ, ServeOptions(device=device))
        assert argv[:3] == ["vllm", "serve", GPTQ.location]
        assert not REMOVED & set(argv)
    assert "--enforce-eager" in get_runtime("vllm").argv(GPTQ, ServeOptions())
    assert "--dtype" in get_runtime("vllm").argv(GPTQ, ServeOptions(dtype="float16"))


def test_vllm_gets_the_dtype_that_its_cpu_kernels_need() -> None:
    w8a8 = Artifact("/m", "m", "compressed-tensors", ("w8a8",), dtype="float16")
    argv = get_runtime("vllm").argv(w8a8, ServeOptions())
    assert argv[argv.index("--dtype") + 1] == "bfloat16"
    for artifact, options in ((w8a8, ServeOptions(device="cuda")), (replace(w8a8, dtype="bfloat16"), ServeOptions())):
        assert "--dtype" not in get_runtime("vllm").argv(artifact, options)


def test_no_key_is_ever_on_a_command_line() -> None:
    for name in RUNTIMES.names():
        assert not any("key" in word for word in get_runtime(name).argv(GPTQ, ServeOptions()))


def test_llama_cpp_context_is_for_each_slot() -> None:
    argv = get_runtime("llama.cpp").argv(GPTQ, ServeOptions(context=512, parallel=4))
    assert argv[argv.index("--ctx-size") + 1] == "2048"
    assert argv[argv.index("--n-gpu-layers") + 1] == "0"


@pytest.mark.parametrize(
    ("runtime", "format", "label", "cpu", "capability"),
    [
        ("vllm", "gptq", "w4a16", True, 70),
        ("vllm", "gptq", "w8a16", False, 70),
        ("vllm", "awq", "w4a16 asymmetric", True, 75),
        ("vllm", "compressed-tensors", "w8a8", True, 75),
        ("vllm", "compressed-tensors", "fp8 channel", True, 89),
        ("vllm", "compressed-tensors", "fp8 tensor static", False, 89),
        ("vllm", "compressed-tensors", "fp8a16 channel", False, 75),
        ("llama.cpp", "gguf", "Q4_K", True, 50),
        ("tensorrt-llm", "modelopt", "nvfp4", False, 100),
        ("transformers", "bitsandbytes", "nf4", True, 60),
    ],
)
def test_support(runtime: str, format: str, label: str, cpu: bool, capability: int) -> None:
    row = get_runtime(runtime).support(format, label)
    assert row is not None
    assert (row.refused, row.cpu, row.capability) == (None, cpu, capability)


def test_refusals_say_what_would_do() -> None:
    row = get_runtime("vllm").support("gptq", "w4a16 reordered")
    assert row is not None
    assert "--act-order static" in (row.refused or "")
    assert get_runtime("tensorrt-llm").support("gptq", "w4a16") is None


def test_labels() -> None:
    weights = WeightScheme(symmetric=False, reordered=True)
    assert label(Scheme("w4a16", weights)) == "w4a16 asymmetric reordered"
    static = ActivationScheme("float", 8, "tensor", dynamic=False)
    assert label(Scheme("fp8", WeightScheme("float", 8, "tensor", 0), static)) == "fp8 tensor static"
    assert label(Scheme("w16a16", None)) == "w16a16"


def test_unknown_runtime() -> None:
    with pytest.raises(RecipeError, match="did you mean 'vllm'"):
        get_runtime("vlm")


@pytest.mark.parametrize(
    "chosen", [None, BitsAndBytes(8), BitsAndBytes(4), BitsAndBytes(4, "fp4", "float16", True)], ids=str
)
def test_variables_there_and_back(chosen: BitsAndBytes | None) -> None:
    assert from_variables(to_variables(chosen)) == chosen


def test_variables_as_people_write_them() -> None:
    assert from_variables({"LOAD_IN_8BIT": "True", "LOAD_IN_4BIT": "false"}) == BitsAndBytes(8)
    assert from_variables({"LOAD_IN_8BIT": "false"}) is None
    four = from_variables({"LOAD_IN_4BIT": "true", "BNB_4BIT_COMPUTE_DTYPE": "float16", "BNB_4BIT_QUANT_TYPE": "nf4"})
    assert four == BitsAndBytes(4, "nf4", "float16")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOAD_IN_8BIT": "true", "LOAD_IN_4BIT": "true"}, "both true"),
        ({"LOAD_IN_8BIT": "flase"}, "neither true nor false"),
        ({"LOAD_IN_4BIT": "true", "BNB_4BIT_QUANT_TYPE": "nf5"}, r"unknown \(did you mean 'nf4'"),
        ({"LOAD_IN_4BIT": "true", "BNB_4BIT_COMPUTE_DTYPE": "half"}, "unknown"),
        ({"BNB_4BIT_QUANT_TYPE": "nf4"}, "LOAD_IN_4BIT is not true"),
        ({"LOAD_IN_8BIT": "true", "BNB_4BIT_USE_DOUBLE_QUANT": "true"}, "LOAD_IN_4BIT is not true"),
    ],
)
def test_variables_that_contradict(variables: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        from_variables(variables)
