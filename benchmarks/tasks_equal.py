"""Are lowbit's task scores lm-eval's? Both run the same items of a local folder: lowbit by `lowbit evaluate`'s own code,
lm-eval by its `hf` model on task definitions written here. Prints both numbers and whether they are equal to the last digit.

    python benchmarks/tasks_equal.py MODEL --data DIR --hellaswag 400 --subjects anatomy,virology --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

from _table import print_table

_HELLASWAG = """task: hellaswag_here
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
process_docs: !function utils.prepared
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}},
  {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""
_UTILS = """from lm_eval.tasks.hellaswag.utils import preprocess


def prepared(rows):
    return rows.map(lambda row: {"query": preprocess(row["ctx"]), "choices": [preprocess(e) for e in row["endings"]]})
"""
_MMLU = """task: mmlu_here_{subject}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {test}, dev: {dev}}}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about {words}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--hellaswag", type=int, default=400, help="items; 0 leaves it out")
    parser.add_argument("--subjects", default="", help="of MMLU")
    parser.add_argument("--mmlu-limit", type=int, default=None, help="first items of each subject")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--packed", action=argparse.BooleanOptionalAction, default=None, help="of lowbit evaluate")
    asked = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    subjects = [name for name in asked.subjects.split(",") if name]
    started = time.monotonic()
    ours = _ours(asked, subjects)
    between = time.monotonic()
    theirs = _theirs(asked, subjects)
    print(f"lowbit {between - started:.0f} s, lm-eval {time.monotonic() - between:.0f} s")
    rows = [
        {"task": task, "metric": metric, "lowbit": repr(ours[task][metric]), "lm-eval hf": repr(value),
         "equal": "yes" if ours[task][metric] == value else "NO"}
        for task, metrics in theirs.items() for metric, value in metrics.items()
    ]  # fmt: skip
    print_table(rows)


def _ours(asked: argparse.Namespace, subjects: list[str]) -> dict[str, dict[str, float]]:
    from lowbit.api.evaluation import Evaluation, evaluate_run
    from lowbit.evals.store import ResultStore

    tasks = [f"hellaswag:{asked.hellaswag}"] * bool(asked.hellaswag) + [
        f"mmlu_{name}" + (f":{asked.mmlu_limit}" if asked.mmlu_limit else "") for name in subjects
    ]
    wanted = Evaluation(
        tasks=",".join(tasks), data=asked.data, dtype=asked.dtype, device=asked.device, batch_size=asked.batch_size,
        packed=asked.packed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as cache:
        evaluate_run(asked.model, wanted=wanted, cache=Path(cache))
        kept = [
            json.loads(file.read_text())["result"]
            for file in ResultStore(Path(cache) / "evaluations").directory.iterdir()
        ]
    return {result["name"]: result["scores"] for result in kept}


def _theirs(asked: argparse.Namespace, subjects: list[str]) -> dict[str, dict[str, float]]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "utils.py").write_text(_UTILS)
        file = asked.data / "hellaswag.validation.jsonl"
        (folder / "hellaswag_here.yaml").write_text(_HELLASWAG.format(file=file))
        for subject in subjects:
            files = {}
            for split in ("test", "dev"):
                rows = (asked.data / f"mmlu.{split}.jsonl").read_text().split("\n")
                own = [row for row in rows if row and json.loads(row)["subject"] == subject]
                files[split] = folder / f"{subject}.{split}.jsonl"
                files[split].write_text("\n".join(own))
            text = _MMLU.format(subject=subject, words=subject.replace("_", " "), **files)
            (folder / f"mmlu_here_{subject}.yaml").write_text(text)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        settings = {"model": "hf", "model_args": f"pretrained={asked.model},dtype={asked.dtype}", "device": asked.device,
                    "batch_size": asked.batch_size, "task_manager": manager, "bootstrap_iters": 0}  # fmt: skip
        found = {}
        if asked.hellaswag:
            done = lm_eval.simple_evaluate(tasks=["hellaswag_here"], limit=asked.hellaswag, **settings)
            found |= done["results"]
        if subjects:
            done = lm_eval.simple_evaluate(
                tasks=[f"mmlu_here_{s}" for s in subjects], num_fewshot=5, limit=asked.mmlu_limit, **settings
            )
            found |= done["results"]
    return {
        task.replace("_here", ""): {
            m.removesuffix(",none"): v for m, v in result.items() if m in ("acc,none", "acc_norm,none")
        }
        for task, result in found.items()
    }


if __name__ == "__main__":
    main()
