"""A small BERT learns scikit-learn's digits with transformers' Trainer: PyTorch's layers beside fastops'.

    pip install fastops[huggingface] scikit-learn
    python examples/huggingface.py

Each row of an image is a word of eight numbers, so the model takes them as `inputs_embeds`; nothing is downloaded. The
same weights are trained twice, from the same random numbers. Then a LoRA adapter is trained on top, merged and frozen.
"""

import argparse
import sys
import tempfile

import torch

import fastops

try:
    from peft import LoraConfig, get_peft_model
    from sklearn.datasets import load_digits
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[huggingface] scikit-learn") from None


class Digits(torch.utils.data.Dataset):
    """8x8 images of ten digits, as sequences of eight rows, each repeated to the width of the model."""

    def __init__(self, width: int) -> None:
        digits = load_digits()
        rows = torch.tensor(digits.images, dtype=torch.float32) / 16
        self.rows, self.labels = rows.repeat(1, 1, width // 8), torch.tensor(digits.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.rows[i], "labels": self.labels[i]}


def bert(width: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * width}
    return BertForSequenceClassification(BertConfig(vocab_size=2, num_labels=10, max_position_embeddings=8, **sizes))


def train(model: torch.nn.Module, data: Digits, steps: int) -> list[float]:
    """The losses of Trainer's steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model, settings, train_dataset=data)
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Digits) -> float:
    model.eval()
    return (model(inputs_embeds=data.rows).logits.argmax(1) == data.labels).float().mean().item()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=64, help="a multiple of 8")
    options = parser.parse_args(arguments)
    data = Digits(options.width)

    plain, model = bert(options.width), bert(options.width)
    print(fastops.replace_(model))  # the one line
    expected, losses = train(plain, data, options.steps), train(model, data, options.steps)
    print("losses with PyTorch:", *(f"{loss:.4f}" for loss in expected))
    print("losses with fastops:", *(f"{loss:.4f}" for loss in losses))
    print(f"right answers: {accuracy(plain, data):.3f} and {accuracy(model, data):.3f}")

    # LoRA: the layers under the adapters are replaced already, and the adapters' own are by a second call.
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]))
    fastops.replace_(adapted)
    train(adapted, data, options.steps)
    merged = adapted.merge_and_unload()

    frozen = fastops.freeze(merged)  # for inference: weights packed, activations in the layers before them
    print(f"right answers after LoRA, merged and frozen: {accuracy(frozen, data):.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
