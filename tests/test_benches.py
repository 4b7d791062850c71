"""Benches that nobody runs every day still run, and print what they promise."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.common.attention import attend
from tests.bench import gpu, roofline
from tests.bench.cases import CASES
from tests.bench.machine import network_share, processor


def test_the_roofline_has_a_row_per_paper_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--size", "micro", "--repeats", "1"])
    first, _, heading, _, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(processor()) and "GFLOP/s in float32" in first
    assert len(rows) == 2 * len(CASES) and all(row.count("|") == heading.count("|") for row in rows)
    flops = {tuple(row.split(" | ")[:2]): float(row.split(" | ")[2]) for row in rows}
    for name in CASES:  # forwards and backwards cost about three times as much, attention more
        ratio = flops[f"| {name}", "training"] / flops[f"| {name}", "sampling"]
        assert 2 < ratio < 4.5


def test_the_roofline_counts_blockwise_attention() -> None:
    q, k, v = (torch.randn(1, 2, 600, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False, custom_mapping=roofline.ATTENTION) as counter:
        attend(q, k, v).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 600 * 600 * 8


def test_everything_for_a_card_runs_on_a_processor(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device", "cpu", "--size", "micro"])
    shown = capsys.readouterr().out
    assert len(re.findall(r"ratio \d", shown)) == 3 * len(CASES)
    for what in ("aMUSEd-256, batch 8", "Paella 1B", "Muse 632M", "pictures/s"):
        assert what in shown


def test_the_networks_share_is_that_of_its_methods() -> None:
    class Busy:
        def work(self, count: int) -> int:
            return sum(range(count))

    busy = Busy()
    share = network_share(lambda: (busy.work(300_000), sum(range(100_000))), busy, "work")
    assert 0 < share < 1 and "work" not in vars(busy)
