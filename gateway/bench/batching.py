"""Would it pay to compute windows of several requests together? CTranslate2 alone, on this machine.

    .venv/bin/python gateway/bench/batching.py [--batches 1 2 4 8] [--rounds 3] [--device cpu] [--json FILE]

The same windows (30 seconds each, as the model always takes) are encoded and decoded in batches of different
sizes, in turn; of each batch the fastest time counts, as other work only adds. `ms` is for one window, `gain`
how many times faster than one by one, `wait_ms` how long the first of a batch waits for its answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from endurance import spoken
from overhead import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "demo" / "whisper-demo"))
    parser.add_argument("--clips", type=Path, default=ROOT / "demo" / "clips")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    figures = measure(args)
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import ctranslate2
    from faster_whisper import WhisperModel
    from faster_whisper.audio import decode_audio, pad_or_trim
    from faster_whisper.tokenizer import Tokenizer

    threads = min(8, len(os.sched_getaffinity(0)))
    model = WhisperModel(args.model, device=args.device, compute_type=args.compute_type, cpu_threads=threads)
    most = max(args.batches)
    rows = itertools.islice(itertools.cycle(spoken(args.clips)), most * max(1, 16 // most))
    windows, prompts = [], []
    for row in rows:
        features = model.feature_extractor(decode_audio(str(args.clips / row["file"])))
        windows.append(pad_or_trim(features[..., :-1]))
        tokenizer = Tokenizer(model.hf_tokenizer, True, task="transcribe", language=row["language"])
        prompts.append(model.get_prompt(tokenizer, [], without_timestamps=False))

    def run(size: int) -> tuple[list[tuple[float, float]], list[list[int]]]:
        """Seconds of encoding and decoding for each batch, and the tokens."""
        taken: list[tuple[float, float]] = []
        tokens: list[list[int]] = []
        for first in range(0, len(windows), size):
            batch = np.ascontiguousarray(np.stack(windows[first : first + size]))
            started = time.perf_counter()
            encoded = model.model.encode(ctranslate2.StorageView.from_array(batch), to_cpu=False)
            middle = time.perf_counter()
            results = model.model.generate(encoded, prompts[first : first + size], beam_size=args.beam_size)
            taken.append((middle - started, time.perf_counter() - middle))
            tokens += [result.sequences_ids[0] for result in results]
        return taken, tokens

    rounds: dict[int, list[list[tuple[float, float]]]] = {size: [] for size in args.batches}
    expected: list[list[int]] = []
    differ = dict.fromkeys(args.batches, 0)
    for turn in range(args.rounds + 1):  # the first one warms up
        for size in args.batches:
            taken, tokens = run(size)
            expected = expected or tokens
            differ[size] = sum(a != b for a, b in zip(expected, tokens, strict=True))
            if turn:
                rounds[size].append(taken)
    figures: dict[str, Any] = {"threads": threads, "windows": len(windows)}
    alone = 0.0
    for size, turns in rounds.items():
        fastest = [min(same, key=sum) for same in zip(*turns, strict=True)]
        encoding, decoding = (sum(part) / len(windows) for part in zip(*fastest, strict=True))
        each = encoding + decoding
        alone = alone or each
        figures[f"batch {size}"] = {
            "encode_ms": round(encoding * 1000, 1),
            "decode_ms": round(decoding * 1000, 1),
            "ms": round(each * 1000, 1),
            "gain": round(alone / each, 3),
            "wait_ms": round(each * size * 1000, 1),
            "other_texts": differ[size],
        }
    return figures


if __name__ == "__main__":
    sys.exit(main())
