"""Methods: HOW the numbers are chosen, one file each."""

from lowbit.core.registry import Registry

METHODS = Registry(
    "method",
    {
        "rtn": "lowbit.methods.rtn:METHOD",
        "gptq": "lowbit.methods.gptq:METHOD",
        "autoround": "lowbit.methods.autoround:METHOD",
        "fp8": "lowbit.methods.fp8:METHOD",
        "fp4": "lowbit.methods.fp4:METHOD",
        "bnb": "lowbit.methods.bnb:METHOD",
    },
)
