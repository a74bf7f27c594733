"""Transforms: what is done to weights before a method, leaving the function of the model unchanged; one file each."""

from lowbit.core.registry import Registry

TRANSFORMS = Registry(
    "transform",
    {"awq": "lowbit.transforms.awq:TRANSFORM", "smoothquant": "lowbit.transforms.smoothquant:TRANSFORM"},
)
