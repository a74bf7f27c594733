"""AutoRound (SignRound): learned rounding."""

from common import Measured, options, windows

parser = options(__doc__)
parser.add_argument("--iters", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=8)

if __name__ == "__main__":
    args = parser.parse_args()
    from pathlib import Path

    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    rows = torch.tensor(windows(args))
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows.split(1)]
    with Measured("auto-round"):
        rounding = AutoRound(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype),
            AutoTokenizer.from_pretrained(args.model),
            bits=args.bits,
            group_size=args.group_size or -1,
            sym=args.sym,
            iters=args.iters,
            dataset=batches,
            nsamples=len(rows),
            seqlen=args.seq_len,
            batch_size=args.batch_size,
            device_map=args.device,
            enable_torch_compile=False,
        )
        rounding.quantize_and_save(args.output, format="auto_gptq")
        for file in [f for folder in Path(args.output).iterdir() if folder.is_dir() for f in folder.iterdir()]:
            file.rename(Path(args.output) / file.name)  # it writes into a folder that it names itself
