"""A causal language model of which one decoder block at a time is in memory.

The modelling code is transformers' own, on the meta device. Blocks are filled from the checkpoint when their turn comes
and emptied again; what each block is called with (masks, position embeddings) is recorded by running the model with
its blocks taken out, so no model family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.core.architectures import Architecture, known_architecture, unknown_architecture
from lowbit.core.attention import attention_in_one_order
from lowbit.core.checkpoint.prefetch import Prefetching
from lowbit.core.contracts import Checkpoint
from lowbit.core.errors import CheckpointError
from lowbit.core.experts import take_experts_apart
from lowbit.core.norms import fuse_norms
from lowbit.core.resident import give_back
from lowbit.core.skeleton import build_skeleton

# what a block is called with beside the states: (positional, by name)
BlockArguments = tuple[tuple[Any, ...], dict[str, Any]]


class StreamedModel:
    """Embedding, blocks and head of a checkpoint, each loaded for as long as it is used.

    device: where weights and activations are computed. dtype: what they are computed in.
    Raises ArchitectureError for a model without a recognizable block list, CheckpointError when the checkpoint lacks
    a parameter or has another shape for it.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.skeleton = build_skeleton(checkpoint.config)
        for buffer_owner in self.skeleton.modules():
            for name, buffer in list(buffer_owner.named_buffers(recurse=False)):
                buffer_owner.register_buffer(name, buffer.to(device), persistent=False)
        fuse_norms(self.skeleton)
        model_type = str(checkpoint.config.get("model_type", ""))
        self.known = known_architecture(model_type) is not None
        self.architecture = known_architecture(model_type) or _guess_architecture(model_type, self.skeleton)
        self.blocks: nn.ModuleList = self.skeleton.get_submodule(self.architecture.blocks)
        self.architecture = take_experts_apart(model_type, self.architecture, self.blocks)
        self._stored = _stored_names(self.skeleton, checkpoint)
        self._arguments: dict[tuple[int, ...], list[BlockArguments]] = {}

    def block_path(self, index: int) -> str:
        """Module path of a block, such as "model.layers.7"."""
        return f"{self.architecture.blocks}.{index}"

    def stored_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter (some checkpoints lack the base model's prefix, or tie the head)."""
        return self._stored[parameter]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the model by name, tied ones once."""
        return {name: tuple(parameter.shape) for name, parameter in self.skeleton.named_parameters()}

    def read_block(self, index: int) -> dict[str, Tensor]:
        """Weights of one block as stored, on the device, by their names within the block. Raises CheckpointError."""
        weights = {name: self._on_device(name) for name in self._in_block(index)}
        self._check_finite(weights)
        if index + 1 < len(self.blocks):
            self._announce(self._in_block(index + 1))
        path = f"{self.block_path(index)}."
        return {name.removeprefix(path): tensor for name, tensor in weights.items()}

    def announce(self) -> None:
        """Start to read what a pass over text needs first, on a GPU: what `embed` does, and the first block."""
        self._announce([*self._outside(head=False), *self._in_block(0)])

    def _announce(self, parameters: Iterable[str]) -> None:
        if isinstance(self.checkpoint, Prefetching):
            self.checkpoint.announce(self._stored[name] for name in parameters)

    def _in_block(self, index: int) -> list[str]:
        return [f"{self.block_path(index)}.{name}" for name, _ in self.blocks[index].named_parameters()]

    def _outside(self, *, head: bool) -> list[str]:
        """Parameters outside of the blocks; without those of an untied head."""
        left_out = {id(parameter) for parameter in self.blocks.parameters()}
        last, first = self.skeleton.get_output_embeddings(), self.skeleton.get_input_embeddings()
        if not head and last is not None and last.weight is not first.weight:
            left_out |= {id(parameter) for parameter in last.parameters()}
        return [name for name, parameter in self.skeleton.named_parameters() if id(parameter) not in left_out]

    def read_outside(self, name: str) -> Tensor:
        """A parameter as stored, on the CPU, whatever was announced. Raises CheckpointError."""
        checkpoint = self.checkpoint.inner if isinstance(self.checkpoint, Prefetching) else self.checkpoint
        return checkpoint.read(self._stored[name])

    @contextmanager
    def block(self, index: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """One block filled from the checkpoint, or with `weights`, in the computing dtype; emptied at the end."""
        module = self.blocks[index]
        state = weights if weights is not None else self.read_block(index)
        module.load_state_dict(
            {name: tensor.to(self.dtype) for name, tensor in state.items()}, strict=False, assign=True
        )
        del state
        module.requires_grad_(False)
        try:
            yield module
        finally:
            _empty(module)
            give_back()

    @contextmanager
    def outside(self, vectors: torch.dtype | None = None, *, head: bool = True) -> Iterator[None]:
        """Everything but the blocks (embeddings, final norm, head) with its weights, freed at the end.

        vectors: the dtype of norms' weights and biases, where it is another than the computing dtype. head: whether an untied
        head is needed; `embed` does without.
        """
        stored = {name: self._on_device(name) for name in self._outside(head=head)}
        self._check_finite(stored)
        state = {
            name: tensor.to(vectors or self.dtype if tensor.dim() == 1 else self.dtype)
            for name, tensor in stored.items()
        }
        del stored
        self.skeleton.load_state_dict(state, strict=False, assign=True)
        self.skeleton.tie_weights()
        try:
            yield
        finally:
            for name in state:
                _set_parameter(self.skeleton, name, _meta_like(state[name]))
            self.skeleton.tie_weights()

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The whole model with all its weights, for what cannot be streamed (sampling text); freed at the end."""
        with self.outside(), ExitStack() as stack:
            for index in range(len(self.blocks)):
                stack.enter_context(self.block(index))
            yield self.skeleton

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] -> inputs of the first block [batch, tokens, hidden]; needs `outside()`.

        Also records what every block is called with for a batch of this shape.
        """
        recorders = [_Recorder(block) for block in self.blocks]
        recorders[-1].last = True
        try:
            with self._replaced(recorders):
                self.skeleton(input_ids=ids.to(self.device), use_cache=False)
        except _Recorded:
            pass
        self._arguments[tuple(ids.shape)] = [(recorder.args, recorder.kwargs) for recorder in recorders]
        hidden = recorders[0].hidden
        assert hidden is not None
        return hidden.to(self.dtype)

    def run_block(
        self, index: int, block: nn.Module, hidden: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Hidden states [batch, tokens, hidden] through one filled block, or through it with other `weights`."""
        return run_module(block, weights, hidden, *self.arguments(index, hidden))

    def arguments(self, index: int, hidden: Tensor) -> BlockArguments:
        """What a block is called with beside states of this shape; known after `embed` of ids of this shape."""
        return self._arguments[tuple(hidden.shape[:2])][index]

    def logits(self, hidden: Tensor) -> Tensor:
        """Outputs of the last block [batch, tokens, hidden] -> logits [batch, tokens, vocabulary]; needs `outside()`."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        injectors: list[nn.Module] = [_Injector(block, hidden) for block in self.blocks]
        with self._replaced(injectors):
            result: Tensor = self.skeleton(input_ids=ids, use_cache=False).logits
        return result

    @contextmanager
    def _replaced(self, stand_ins: list[Any]) -> Iterator[None]:
        parent = self.skeleton.get_submodule(self.architecture.blocks.rpartition(".")[0])
        attribute = self.architecture.blocks.rpartition(".")[2]
        setattr(parent, attribute, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(parent, attribute, self.blocks)

    def _on_device(self, parameter: str) -> Tensor:
        return self.checkpoint.read(self._stored[parameter]).to(self.device)

    def _check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for NaN; asks the device once for all tensors."""
        # a sum tells in a tenth of the time that looking at every number takes; it may only overflow by itself
        finite = torch.stack([tensor.sum(dtype=torch.float32).isfinite() for tensor in tensors.values()]).tolist()
        for name, good in zip(tensors, finite, strict=True):
            if not good and not torch.isfinite(tensors[name]).all():
                raise CheckpointError(
                    f"tensor {self._stored[name]!r} holds NaN or infinity: the checkpoint is damaged",
                    hint="download it again, or take another checkpoint",
                )


def run_module(
    block: nn.Module,
    weights: Mapping[str, Tensor] | None,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Hidden states through a block with its own weights, or others; reproducibly where that is asked for."""
    with attention_in_one_order():
        if weights is None:
            output = block(hidden, *args, **kwargs)
        else:
            output = torch.func.functional_call(block, dict(weights), (hidden, *args), kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


class _Recorded(Exception):  # noqa: N818 - control flow, not an error
    """The last block's arguments are known: the rest of the model need not run."""


class _Recorder(nn.Module):
    """Stands where a block was, notes what it is called with, and hands its input on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "stood_for", block)
        self.hidden: Tensor | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.last = False

    def __getattr__(self, name: str) -> Any:
        # models read attributes of their blocks (attention_type and the like) before calling them
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stood_for"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        if self.last:
            raise _Recorded
        return hidden


class _Injector(_Recorder):
    """Stands where a block was and gives known hidden states whatever it is called with."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__(block)
        self.hidden = hidden

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.hidden is not None
        return self.hidden


def _set_parameter(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(owner), leaf, parameter)


def _meta_like(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)


def _empty(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        _set_parameter(module, name, _meta_like(parameter))


def _stored_names(skeleton: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> the checkpoint's name for it, shapes compared. Raises CheckpointError."""
    prefix = f"{skeleton.base_model_prefix}."
    tensors = checkpoint.tensors
    stored = {}
    for name, parameter in skeleton.named_parameters():
        candidates = (name, name.removeprefix(prefix), prefix + name, f"language_model.{name}")
        found = next((candidate for candidate in candidates if candidate in tensors), None)
        if found is None:
            raise CheckpointError(
                f"{checkpoint.location} lacks the tensor {name!r} that its config.json asks for",
                hint="download the checkpoint again, or correct config.json",
            )
        if tensors[found].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"tensor {found!r} has shape {list(tensors[found].shape)}, config.json asks for {list(parameter.shape)}",
                hint="weights and config.json belong to different models",
            )
        stored[name] = found
    return stored


def _guess_architecture(model_type: str, skeleton: nn.Module) -> Architecture:
    """The longest list of equal modules is the list of blocks; each linear layer is taken to have an input of its own."""
    lists = [
        (path, module)
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise unknown_architecture(model_type, "it has no list of equal blocks")
    path, blocks = max(lists, key=lambda item: len(item[1]))
    linears = tuple((name,) for name, child in blocks[0].named_modules() if isinstance(child, nn.Linear))
    if not linears:
        raise unknown_architecture(model_type, f"the blocks at {path} have no linear layers")
    return Architecture(blocks=path, linears=linears)
