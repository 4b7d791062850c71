from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.digits import digit_classifier, held_out_digits, read_digits, score_digits
from eval.extractors import DigitRows
from eval.rows import Measured


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, np.ndarray]:
    """Held-out real digits, enlarged as data.digits enlarges them."""
    _, pixels, _, labels = held_out_digits()
    small = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    bicubic = Image.Resampling.BICUBIC
    large = [np.asarray(Image.fromarray(s).resize((32, 32), bicubic)) for s in small]
    grey = torch.from_numpy(np.stack(large))
    return grey[:, None].expand(-1, 3, -1, -1), labels


def test_reads_enlarged_real_digits(pictures: tuple[torch.Tensor, np.ndarray]) -> None:
    images, labels = pictures
    assert digit_classifier()[1] >= 0.97
    assert (read_digits(images) == labels).mean() >= 0.95


def test_score_table_and_verdicts(pictures: tuple[torch.Tensor, np.ndarray]) -> None:
    images, labels = pictures
    asked = labels.copy()
    planted = np.flatnonzero((labels == 3) & (read_digits(images) == 3))[:10]
    asked[planted] = 8
    made = DigitRows().load("cpu", folder=Path("unused"))(images, [], 0)
    assert made.rows["read"].dtype == np.int16
    scores, verdicts = score_digits(
        made,
        [{"label": int(label)} for label in asked],
        None,
        prefix="eval",
        resamples=100,
        seed=0,
        pictures="enlarged",
    )
    top = scores["eval/digit_accuracy"]
    assert "SVM" in top["model"] and top["pictures"] == "enlarged"
    assert top["low"] <= top["value"] <= top["high"] and top["n"] == len(labels)
    assert set(scores) == {
        top_name := "eval/digit_accuracy",
        *(f"{top_name}/{d}" for d in range(10)),
    }
    assert scores["eval/digit_accuracy/8"]["n"] == (asked == 8).sum()
    for index in planted:
        verdict = {"right": False, "wrong": ["digit"], "read": 3, "text": "a handwritten 3"}
        assert verdicts[index] == verdict
    assert np.mean([v["right"] for v in verdicts]) == pytest.approx(top["value"])


def test_refuses_floats_and_unpaired_labels() -> None:
    with pytest.raises(ValueError, match="uint8"):
        read_digits(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="pair up"):
        made, options = Measured({"read": np.zeros(2)}), {"resamples": 9, "seed": 0}
        score_digits(made, [{"label": 1}], None, prefix="eval", **options)
