"""GPTQModel's GPTQ, written in GPTQ's format."""

from common import Measured, options, windows

parser = options(__doc__)
parser.add_argument(
    "--actorder",
    choices=["groups", "static", "columns", "none"],
    default="groups",
    help="groups: by activation, groups and the columns within each (its own default); static: columns, on grids fitted "
    "before; columns: columns, on grids across the original groups, which stores their indices",
)
parser.add_argument("--gptaq", action="store_true", help="asymmetric calibration: aim at the original model's outputs")
parser.add_argument("--dampening", type=float, help="share of the mean diagonal (its own default 0.05)")

if __name__ == "__main__":
    args = parser.parse_args()
    import contextlib
    import os
    import sys
    import tempfile
    from pathlib import Path

    # with fewer than three CPUs 7.6.0 gives itself one worker and then refuses, because it needs two
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(args.threads, 2))
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig, extension
    from gptqmodel.quantization.config import GPTAQConfig

    torch.set_num_threads(args.threads)
    examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows(args)]
    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size or -1,
        sym=args.sym,
        desc_act=args.actorder in ("static", "columns"),
        static_groups=args.actorder == "static",
        act_group_aware=args.actorder == "groups",
        damp_percent=args.dampening,
        gptaq=GPTAQConfig() if args.gptaq else None,
        device=args.device,
    )
    source, output = str(Path(args.model).absolute()), str(Path(args.output).absolute())
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars go to stdout
        extension.is_available("pack_block_cpu")  # compiles it on first use: no part of the time
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.chdir(scratch),  # it writes its logs into the current directory
        Measured("gptqmodel"),
        contextlib.redirect_stdout(sys.stderr),
    ):
        model = GPTQModel.load(source, config, dtype=args.dtype)
        model.quantize(examples)
        model.save(output)
