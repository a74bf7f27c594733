"""Methods: HOW the numbers are chosen, one file each."""

from lowbit.core.registry import Registry

METHODS = Registry("method", {"rtn": "lowbit.methods.rtn:METHOD", "gptq": "lowbit.methods.gptq:METHOD"})
