"""HQQ (half-quadratic quantization): zero points fitted to the weights alone, so the calibration windows go unused.

Its zero points are floats, where GPTQ's format has integers. So besides HQQ's own storage, which is what gets counted, the
weights that HQQ's own dequantization makes of it go to OUTPUT/dense, in float32.
"""

from common import Measured, options

parser = options(__doc__)
parser.add_argument("--axis", type=int, choices=[0, 1], default=1, help="1: groups along a row, as everybody's")

if __name__ == "__main__":
    args = parser.parse_args()
    if args.sym:
        parser.error("HQQ has no symmetric grid: --no-sym")
    from pathlib import Path

    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
    from hqq.models.hf.base import AutoHQQHFModel
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    grid = BaseQuantizeConfig(nbits=args.bits, group_size=args.group_size or None, axis=args.axis)
    with Measured("hqq"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        AutoHQQHFModel.quantize_model(model, grid, compute_dtype=model.dtype, device=args.device)
        model.config.quantization_config = {"quant_method": "hqq", "quant_config": grid, "skip_modules": ["lm_head"]}
        model.config.save_pretrained(output)
        save_model(model, str(output / "model.safetensors"))

    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, HQQLinear):
            weight = Quantizer.dequantize(layer.W_q, {**layer.meta, "compute_dtype": torch.float32})
            dense.get_submodule(name).weight.data.copy_(weight)
    dense.save_pretrained(output / "dense")
