"""ModelOpt's own quantization and export of a model: `export_hf_checkpoint`, unmodified, on a CPU."""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--config", required=True, help="FP8_DEFAULT_CFG, INT4_AWQ_CFG, NVFP4_DEFAULT_CFG ...")
    parser.add_argument("--kv-cache", action="store_true", help="FP8_KV_CFG on top")
    args = parser.parse_args()
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    ids = torch.randint(0, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(0))
    config = copy.deepcopy(getattr(mtq, args.config))
    if args.kv_cache:
        extra = mtq.FP8_KV_CFG["quant_cfg"]
        if isinstance(extra, dict):
            config["quant_cfg"].update(extra)
        else:
            config["quant_cfg"] = [*config["quant_cfg"], *extra]
    model = mtq.quantize(model, config, lambda model: [model(row[None]) for row in ids])
    with torch.inference_mode():
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=args.output)
