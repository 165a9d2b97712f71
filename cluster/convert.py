"""Turns the demo model's GGUF file into a Hugging Face folder and proves that it can be used: `python -m hocket.cluster.convert`.

Weights come from transformers' own GGUF reader, dequantized to float32 (on a CPU, bfloat16 is several times slower).
What that reader does not restore is set here: the digit split of the tokenizer (GGUF says it as `pre = smollm`), and
configuration in the spelling that transformers 4 and 5 both read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_EOS = "<|im_end|>"
_CONTEXT_TOKENS = 8192


def convert_smollm2(gguf: Path, folder: Path) -> None:
    """Write `folder` from `gguf`. Raises ImportError or OSError when a library is missing or a file cannot be read."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # Everything is in the file; nothing may be asked of the network.
    import torch  # These three are optional and take seconds to import.
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.save(str(folder / "tokenizer.json"))
    _write_configs(folder, tokenizer.chat_template)


def _write_configs(folder: Path, chat_template: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("_model_name_or_path", None)
    config["rms_norm_eps"] = 1e-5  # GGUF keeps it as float32: 9.99999974e-06.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # transformers 4 reads this one.
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": _EOS,
        "pad_token": _EOS,
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _CONTEXT_TOKENS,
        "chat_template": chat_template,
    }
    for name, content in (
        ("config.json", config | ids),
        ("generation_config.json", ids),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600; every other file follows the umask.


def verify(folder: Path) -> None:
    """Raises ValueError, naming what is wrong, unless the folder loads, renders a chat and ends answers at <|im_end|>."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    eos = tokenizer.convert_tokens_to_ids(_EOS)
    facts = {
        "the chat template renders the user's turn": "<|im_start|>user\nHi<|im_end|>\n" in text,
        "the chat template asks for an answer": text.endswith("<|im_start|>assistant\n"),
        "the tokenizer ends at <|im_end|>": tokenizer.eos_token_id == eos == 2,
        "the generation config ends at <|im_end|>": GenerationConfig.from_pretrained(folder).eos_token_id == eos,
        "the model ends at <|im_end|>": AutoConfig.from_pretrained(folder).eos_token_id == eos,
        "every digit is a token": len(tokenizer("1234")["input_ids"]) == 4,
        "text survives the tokenizer": tokenizer.decode(tokenizer("naïve café, 5 €")["input_ids"]) == "naïve café, 5 €",
    }
    wrong = [fact for fact, holds in facts.items() if not holds]
    if wrong:
        raise ValueError(f"the converted model in {folder} is not usable; not true: {', '.join(wrong)}")


def main() -> int:
    """Usage: python -m hocket.cluster.convert FILE.gguf FOLDER"""
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        convert_smollm2(gguf, folder)
        verify(folder)
    except ImportError as error:
        print(f"converting needs torch, transformers, accelerate and gguf: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
