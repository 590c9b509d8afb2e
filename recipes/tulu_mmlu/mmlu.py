"""Write MMLU as a proxy set (dev and validation) and as test rows: one task a subject, four choices a row.

    python recipes/tulu_mmlu/mmlu.py --output_dir runs/mmlu

makes runs/mmlu/proxy.jsonl (285 + 1,531 rows) and runs/mmlu/test.jsonl (14,042 rows) from `cais/mmlu`.
"""

import argparse

from datasets import concatenate_datasets, load_dataset

LETTERS = ["A", "B", "C", "D"]


def row(question: dict) -> dict:
    """One question as prompt, answer, choices and task."""
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question["choices"], strict=True))
    subject = question["subject"]
    return {
        "prompt": f"The following is a multiple choice question about {subject.replace('_', ' ')}.\n\n"
        f"{question['question'].strip()}\n{choices}\nAnswer:",
        "answer": LETTERS[question["answer"]],
        "choices": LETTERS,
        "task": subject,
    }


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset_name", default="cais/mmlu")
parser.add_argument("--output_dir", default="runs/mmlu")
asked = parser.parse_args()
mmlu = load_dataset(asked.dataset_name, "all")
for name, splits in (("proxy", ["dev", "validation"]), ("test", ["test"])):
    rows = concatenate_datasets([mmlu[split] for split in splits])
    rows = rows.map(row, remove_columns=rows.column_names)
    rows.to_json(f"{asked.output_dir}/{name}.jsonl")
    print(f"{len(rows)} rows of {len(set(rows['task']))} tasks written to {asked.output_dir}/{name}.jsonl.")
