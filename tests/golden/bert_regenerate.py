"""A tiny random BERT by Hugging Face's transformers: its checkpoint, an input and what comes out.

``python -m tests.golden.bert_regenerate`` writes them anew; it needs PyTorch and transformers.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "bert_tiny"
EXPECTED = FOLDER / "expected.npz"
LABELS = 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a", "film", "##s", "is", "."]


def batch():
    """Three pairs of sentences, padded."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, len(WORDS), (3, 8)).astype(np.int32)
    lengths, first = np.array([8, 5, 3]), np.array([4, 3, 2])
    place = np.arange(8)
    mask = (place < lengths[:, None]).astype(np.int32)
    types = ((place >= first[:, None]) * mask).astype(np.int32)
    return {"ids": ids * mask, "mask": mask, "types": types}


def outputs(model, inputs):
    """Hidden states after the embeddings and every layer, and logits, of a transformers model."""
    import torch

    names = {"ids": "input_ids", "mask": "attention_mask", "types": "token_type_ids"}
    tensors = {names[key]: torch.tensor(value).long() for key, value in inputs.items()}
    with torch.no_grad():
        found = model(**tensors, output_hidden_states=True)
    hidden = [state.numpy() for state in found.hidden_states]
    return hidden, found["logits"].numpy() if "logits" in found else None


def main():
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=12, num_labels=LABELS,
        initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "LayerNorm" in name:  # which start at zeros and ones
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    model.save_pretrained(FOLDER)
    (FOLDER / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    inputs = batch()
    hidden, logits = outputs(model, inputs)
    np.savez(EXPECTED, hidden=np.stack(hidden), logits=logits, **inputs)


if __name__ == "__main__":
    main()
