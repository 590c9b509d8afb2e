"""Finetune on a selection with TRL, from the Hub or from disk: what `trl sft` does, in Python to build on.

    python recipes/sft_on_selection.py --config recipes/sft_on_selection.yaml --dataset_name me/my-selection
    python recipes/sft_on_selection.py --config recipes/sft_on_selection.yaml --dataset_name runs/first/result/harp-c

Takes the flags and YAML keys of `trl sft`. For fewer rows let HARP choose anew, with `harp-hf cut --budget 200` or
`result.select(budget=200)`: a selection stands leaf by leaf, and its first rows serve a task or two.
"""

from datasets import load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)


def main() -> None:
    script, args, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config()
    loaded = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    if quantization := get_quantization_config(model):
        loaded["quantization_config"] = quantization
    args.model_init_kwargs = loaded | (args.model_init_kwargs or {})
    rows = load_dataset(script.dataset_name, name=script.dataset_config, split=script.dataset_train_split)
    trainer = SFTTrainer(
        model=model.model_name_or_path, args=args, train_dataset=rows, peft_config=get_peft_config(model)
    )
    trainer.accelerator.print(f"Finetuning {model.model_name_or_path} on {len(rows)} rows of {script.dataset_name}.")
    loss = trainer.train().training_loss
    trainer.save_model()
    trainer.accelerator.print(f"Adapter written to {args.output_dir}; mean loss {loss:.3f}.")


if __name__ == "__main__":
    main()
