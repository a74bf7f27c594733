"""llm-compressor's round to nearest (QuantizationModifier)."""

from common import options

parser = options(__doc__)

if __name__ == "__main__":
    args = parser.parse_args()
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor_common import run, weight_groups

    run(args, [QuantizationModifier(config_groups=weight_groups(args), ignore=["lm_head"])])
