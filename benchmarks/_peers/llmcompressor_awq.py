"""llm-compressor's AWQ scaling, then round to nearest."""

from common import options

parser = options(__doc__)
parser.add_argument("--duo-scaling", choices=["true", "false", "both"], default="both")
parser.add_argument("--grid", type=int, default=20)
parser.set_defaults(dtype="float32")  # in float16 its search finds no finite loss on SmolLM2

if __name__ == "__main__":
    args = parser.parse_args()
    from unittest.mock import patch

    import torch
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor_common import run, weight_groups

    recipe = [
        AWQModifier(duo_scaling={"true": True, "false": False, "both": "both"}[args.duo_scaling], n_grid=args.grid),
        QuantizationModifier(config_groups=weight_groups(args), ignore=["lm_head"]),
    ]
    if torch.accelerator.is_available():
        run(args, recipe)
    else:
        # 0.14.0.1 pins memory for copies to an accelerator even where there is none; torch refuses. No number changes.
        with patch.object(IntermediatesCache, "pin_memory", lambda *_: None):
            run(args, recipe)
