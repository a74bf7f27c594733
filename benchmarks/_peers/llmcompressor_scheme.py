"""One of llm-compressor's named schemes (FP8_DYNAMIC, NVFP4A16 ...), rounded to nearest or by GPTQ."""

from common import options

parser = options(__doc__)
parser.add_argument("--scheme", required=True)
parser.add_argument("--gptq", action="store_true")

if __name__ == "__main__":
    args = parser.parse_args()
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor_common import run

    modifier = GPTQModifier if args.gptq else QuantizationModifier
    run(args, [modifier(targets="Linear", scheme=args.scheme, ignore=["lm_head"])])
