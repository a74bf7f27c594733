"""llm-compressor's SmoothQuant, then round to nearest or GPTQ, with int8 activations scaled per token (W8A8)."""

from common import options

parser = options(__doc__)
parser.add_argument("--strength", type=float, default=0.5, help="alpha of the paper")
parser.add_argument("--then", choices=["rtn", "gptq"], default="rtn")
parser.set_defaults(bits=8, group_size=0)

if __name__ == "__main__":
    args = parser.parse_args()
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SmoothQuantModifier
    from llmcompressor_common import run, weight_groups

    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    modifier = GPTQModifier if args.then == "gptq" else QuantizationModifier
    run(
        args,
        [
            SmoothQuantModifier(smoothing_strength=args.strength),
            modifier(config_groups=weight_groups(args, activations), ignore=["lm_head"]),
        ],
    )
