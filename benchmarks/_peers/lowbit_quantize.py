"""lowbit itself, in a process of its own like the peers, so that seconds and memory are measured the same way."""

import argparse
import json
from pathlib import Path

from common import Measured

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--recipe", required=True, help="the arguments of lowbit.quantize as JSON")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - what the peers have imported

    import lowbit
    from lowbit.api.run import Settings

    torch.set_num_threads(args.threads)
    with Measured("lowbit"):
        # text that the model writes counts, so none that an earlier row wrote is taken
        settings = Settings(verify=False, texts=Path(args.output).with_suffix(".texts"))
        lowbit.quantize(args.model, output=args.output, settings=settings, **json.loads(args.recipe))
