"""transformers' own way to NF4: load with a BitsAndBytesConfig, double quantization on, and save."""

import argparse

from common import Measured

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    with Measured("bitsandbytes"):
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float16, quantization_config=config, device_map={"": args.device}
        )
        model.save_pretrained(args.output)
