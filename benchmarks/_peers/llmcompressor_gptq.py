"""llm-compressor's GPTQ."""

from common import options

parser = options(__doc__)
parser.add_argument("--actorder", choices=["static", "group", "none"], default="static")
parser.add_argument("--dampening", type=float, default=0.01)

if __name__ == "__main__":
    args = parser.parse_args()
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor_common import run, weight_groups

    actorder = None if args.actorder == "none" else args.actorder
    groups = weight_groups(args)
    run(
        args,
        [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder=actorder, dampening_frac=args.dampening)],
    )
