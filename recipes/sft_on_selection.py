"""Finetune on a selection with TRL, from the Hub or from disk, on all of it or on its best rows.

    python recipes/sft_on_selection.py --config recipes/sft_on_selection.yaml --dataset_name me/my-selection
    python recipes/sft_on_selection.py --config recipes/sft_on_selection.yaml \
        --dataset_name runs/first/result/harp-c --best_rows 200

Takes the flags and YAML keys of `trl sft`, and `--best_rows`. A selection stands in greedy order, so that its first
rows are the best of it.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config


@dataclass
class SelectionArguments(ScriptArguments):
    best_rows: int | None = field(default=None, metadata={"help": "Train on that many of the first rows only."})


def main() -> None:
    script, args, model = TrlParser((SelectionArguments, SFTConfig, ModelConfig)).parse_args_and_config()
    rows = load_dataset(script.dataset_name, split=script.dataset_train_split)
    if script.best_rows is not None:
        rows = rows.select(range(min(script.best_rows, len(rows))))
    trainer = SFTTrainer(
        model=model.model_name_or_path, args=args, train_dataset=rows, peft_config=get_peft_config(model)
    )
    trainer.accelerator.print(f"Finetuning {model.model_name_or_path} on {len(rows)} rows of {script.dataset_name}.")
    loss = trainer.train().training_loss
    trainer.save_model()
    trainer.accelerator.print(f"Adapter written to {args.output_dir}; mean loss {loss:.3f}.")


if __name__ == "__main__":
    main()
