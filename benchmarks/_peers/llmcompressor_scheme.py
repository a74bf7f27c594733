"""One of llm-compressor's named schemes (FP8_DYNAMIC, NVFP4A16 ...), rounded to nearest."""

from common import options

parser = options(__doc__)
parser.add_argument("--scheme", required=True)

if __name__ == "__main__":
    args = parser.parse_args()
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor_common import run

    run(args, [QuantizationModifier(targets="Linear", scheme=args.scheme, ignore=["lm_head"])])
