"""Attention over prefix-shared rows with each flash kernel that torch can activate: ``python -m benchmarks.gpu.flash``.

FA2 is torch's own; FA3 and FA4 want their packages (flash-attn-3, flash-attn-4). Forward and backward of one layer of
Llama 8B's shape, rows of 16,384 tokens in lengths of HH and of UltraFeedback.
"""

import statistics

import torch
from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls

from benchmarks.trl.cases import CASES, draw_lengths
from dpo_cli.data.batching import collate
from dpo_cli.models.attention import prefix_shared_attention
from tests.helpers import random_pairs

HEADS, GROUPS, SIZE, TOKENS = 32, 8, 128, 16_384


def seconds(case: str) -> float:
    """Median of some calls, forward and backward."""
    (any_pair,), lengths, tokens = random_pairs(1), [], 0
    for each in draw_lengths(CASES[case], 1000, 4096):
        if (tokens := tokens + sum(each)) > TOKENS:
            break
        lengths.append(each)
    ids = [[any_pair.prompt.repeat(n)[:n] for n in each] for each in lengths]
    segments = collate([type(any_pair)("row", *each) for each in ids], "shared").to(torch.device("cuda")).segments
    shapes, rows = [(1, HEADS), (1, GROUPS), (1, GROUPS)], sum(map(sum, lengths))
    made = [torch.randn(*shape, rows, SIZE, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    taken = []
    for _ in range(12):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        out, _ = prefix_shared_attention(torch.nn.Module(), *made, None, segments=segments, flash=True)
        out.sum().backward()
        ended.record()
        torch.cuda.synchronize()
        taken.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(taken[2:])


def main() -> None:
    if not torch.cuda.is_available():
        print("left out: flash kernels want a CUDA device")
        return
    for impl in ("FA2", *list_flash_attention_impls()):  # the first is what torch brings
        try:
            if impl != "FA2":
                activate_flash_attention_impl(impl)
            took = ", ".join(f"{case} {1e3 * seconds(case):.2f} ms" for case in ("hh", "ultrafeedback"))
            print(f"{impl}: {took}", flush=True)
        except Exception as error:  # of any type that a missing or foreign kernel raises
            print(f"{impl} is left out: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
