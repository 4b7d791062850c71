import itertools
from dataclasses import asdict, replace
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.scene_captions import caption, caption_in_part
from data.scene_drawing import BACKGROUNDS, SIZES, Scene, Thing, draw_scene, place, sample_scene
from data.scenes import scenes
from eval import scenes as module
from eval.classifier import load_classifier, reading_accuracy, train_classifier
from eval.classifier_config import WEIGHTS, ClassifierConfig
from eval.classifier_data import IGNORE, broken_sample, fresh_scenes, to_tensor, wear
from eval.classifier_network import (
    Classifier,
    decode,
    encode,
    read_classifier,
    save_classifier,
    shrink,
)
from eval.extractors import SceneRows
from eval.rows import Measure, Measured
from eval.scene_clip import (
    END,
    UNKNOWN,
    SceneClip,
    load_clip,
    read_clip,
    retrieval_accuracy,
    save_clip,
    text_labels,
    tokenize,
    training_caption,
    variant,
)
from eval.scenes import PARTS, compare, in_words, score_scenes

KEYS = ("color", "shape", "size")
RED, BLUE = Thing("red", "circle", "small"), Thing("blue", "square", "large")
LARGE = replace(RED, size="large")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


@pytest.fixture(scope="module")
def clip() -> SceneClip:
    return load_clip()


@cache
def fresh(count: int = 400) -> tuple[torch.Tensor, list[dict], list[str]]:
    return fresh_scenes(count, ClassifierConfig(), seed=31)


def pictures(scene_list: list[Scene]) -> torch.Tensor:
    rng = np.random.default_rng(5)
    return to_tensor([draw_scene(s, place(s, rng)) for s in scene_list])


@cache
def measure() -> Measure:
    return SceneRows.of(32, 2).load("cpu", folder=Path("unused"))


@cache
def reference() -> Measured:
    images, _, captions = fresh()
    return measure()(images, [{"caption": c} for c in captions], 0)


def score(shown: list[Scene], asked: list[Scene]) -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(6)
    prompts = [{"attributes": asdict(s), "prompt": caption(s, rng)} for s in asked]
    made = measure()(pictures(shown), prompts, 0)
    return score_scenes(
        made, prompts, reference(), prefix="eval", resamples=50, seed=0, pictures="drawn"
    )


def test_reads_fresh_scenes(classifier: Classifier) -> None:
    # val and heldout by halves, of a seed that training never saw
    assert reading_accuracy(classifier, 1000) >= 0.99


def test_reads_worn_and_jpeg_pictures(classifier: Classifier) -> None:
    images, attributes, _ = fresh()
    truth = torch.tensor([encode(a, classifier.config) for a in attributes])
    worn = wear(shrink(images, 32), torch.Generator().manual_seed(0))
    assert (classifier.read((worn * 255).byte())[0] == truth).all(1).double().mean() >= 0.95
    packed = []
    for image in images.permute(0, 2, 3, 1).numpy():
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", quality=90)
        packed.append(np.asarray(Image.open(buffer)))
    assert (classifier.read(to_tensor(packed))[0] == truth).all(1).double().mean() >= 0.97


def test_does_not_guess_at_broken_pictures(classifier: Classifier) -> None:
    rng = np.random.default_rng(8)
    broken = [broken_sample(classifier.config, rng) for _ in range(400)]
    none = torch.tensor([len(o) for o in classifier.config.heads])
    labels = torch.tensor([label for _, label in broken])
    impossible = (labels == none).any(dim=1)  # a layout, background or attribute is none
    read = classifier.read(to_tensor([image for image, _ in broken]))[0]
    seen = (read == none).any(dim=1)
    assert impossible.sum() > 200
    assert seen[impossible].double().mean() >= 0.95
    noise = torch.randint(0, 256, (50, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    assert (classifier.read(noise.byte())[0] == none).any(1).double().mean() >= 0.9


def test_reading_does_not_depend_on_batches_and_sizes(classifier: Classifier) -> None:
    images = fresh()[0][:20]
    labels, features = classifier.read(images)
    assert labels.shape == (20, 8) and features.shape == (20, classifier.config.features)
    one_by_one = classifier.read(images, batch_size=1)
    assert torch.equal(one_by_one[0], labels)
    torch.testing.assert_close(one_by_one[1], features, rtol=1e-4, atol=1e-4)
    enlarged = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(classifier.read(enlarged)[0], labels)
    with pytest.raises(ValueError, match="uint8"):
        classifier.read(images.float())


def test_labels_go_back_and_forth(classifier: Classifier) -> None:
    scene = Scene((RED, BLUE), "row", "grey")
    config = classifier.config
    labels = encode(asdict(scene), config)
    assert Scene.from_attributes(decode(labels, config)) == scene
    with pytest.raises(ValueError, match="at most 2"):
        encode(asdict(Scene((RED, BLUE, RED), "two above one", "grey")), config)
    with pytest.raises(ValueError, match="'pink'"):
        encode(asdict(Scene((RED, BLUE), "row", "pink")), config)


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (Scene((RED, BLUE), "row", "grey"), []),
        (Scene((RED, BLUE), "row", "white"), ["background"]),
        (Scene((RED, BLUE), "column", "grey"), ["relation"]),
        (Scene((BLUE, RED), "row", "grey"), ["relation"]),
        (Scene((replace(RED, color="green"), BLUE), "row", "grey"), ["color"]),
        (Scene((replace(RED, color="blue"), replace(BLUE, color="red")), "row", "grey"), ["color"]),
        (Scene((RED, replace(BLUE, shape="triangle")), "row", "grey"), ["shape"]),
        (Scene((LARGE, BLUE), "row", "grey"), ["size"]),
        (Scene((LARGE, BLUE), "column", "black"), ["size", "relation", "background"]),
    ],
)
def test_verdict_names_exactly_the_planted_error(shown: Scene, wrong: list[str]) -> None:
    asked = Scene((RED, BLUE), "row", "grey")
    scores, verdicts = score([shown] * 4, [asked] * 4)
    for verdict in verdicts:
        assert verdict["wrong"] == wrong
        assert verdict["right"] == (not wrong)
        assert Scene.from_attributes(verdict["read"]) == shown
    assert scores["eval/scene_accuracy"]["value"] == (not wrong)
    for part in PARTS:
        value = scores[f"eval/scene_accuracy/{part}"]["value"]
        assert value == 1 if part not in wrong else value < 1


def test_things_alike_may_swap_places() -> None:
    twins = Scene((RED, RED), "row", "grey")
    labels = torch.tensor([encode(asdict(twins), ClassifierConfig())])
    assert all(float(v) == 1 for v in compare(labels, labels).values())


def test_unread_things_agree_with_nothing() -> None:
    config = ClassifierConfig()
    truth = torch.tensor([encode(asdict(Scene((RED, BLUE), "row", "grey")), config)])
    none = torch.tensor([[len(o) for o in config.heads]])
    assert all(float(v) == 0 for v in compare(none, truth).values())
    # only the second asked thing is there, read in the first slot: it counts, its place does not
    one = none.clone()
    one[:, 2:5] = truth[:, 5:8]
    parts = compare(one, truth)
    assert [float(parts[p]) for p in PARTS] == [0.5, 0.5, 0.5, 0, 0]


def test_fewer_things_than_slots() -> None:
    config = ClassifierConfig(max_objects=4)
    rng = np.random.default_rng(0)
    asked = [sample_scene(rng, 4) for _ in range(50)]
    truth = torch.tensor([encode(asdict(s), config) for s in asked])
    assert all((v == 1).all() for v in compare(truth, truth).values())
    swapped = [replace(s, things=s.things[::-1]) for s in asked]
    parts = compare(torch.tensor([encode(asdict(s), config) for s in swapped]), truth)
    for index, (a, b) in enumerate(zip(asked, swapped, strict=True)):
        assert parts["color"][index] == parts["shape"][index] == parts["size"][index] == 1
        assert parts["relation"][index] == (a.things == b.things)


def test_best_assignment_equals_a_plain_search() -> None:
    config = ClassifierConfig(max_objects=3)
    rng = np.random.default_rng(1)
    asked, read = ([sample_scene(rng, 3) for _ in range(60)] for _ in range(2))
    groups = (torch.tensor([encode(asdict(s), config) for s in g]) for g in (read, asked))
    parts = compare(*groups)
    for index, (r, a) in enumerate(zip(read, asked, strict=True)):
        things = [*r.things, *[None] * (3 - len(r.things))]

        def agreeing(order: tuple, wanted: tuple = a.things) -> int:
            pairs = [(x, y) for x, y in zip(order, wanted, strict=False) if x]
            return sum(getattr(x, k) == getattr(y, k) for x, y in pairs for k in KEYS)

        most = max(map(agreeing, itertools.permutations(things)))
        ours = sum(float(parts[k][index]) for k in KEYS) * len(a.things)
        assert ours == pytest.approx(most)


def test_real_pictures_score_at_the_floor() -> None:
    _, others, _ = fresh_scenes(400, ClassifierConfig(), seed=32)
    shown = [Scene.from_attributes(a) for a in others[::2]]
    scores, _ = score(shown, shown)
    assert scores["eval/scene_accuracy"]["value"] >= 0.98
    fd, floor = scores["eval/fd_scenes"], scores["eval/fd_scenes_floor"]
    assert fd["n"] == floor["n"] == 200
    assert fd["value"] < 2 * floor["value"]
    assert fd["low"] < fd["value"] < fd["high"]
    real = scores["eval/clip_scenes_real"]["value"]
    assert scores["eval/clip_scenes"]["value"] == pytest.approx(real, abs=0.03)
    assert "classifier" in fd["model"] and "CLIP" in scores["eval/clip_scenes"]["model"]
    assert fd["reference"] == "200 real pictures of other captions"
    assert all(score["pictures"] == "drawn" for score in scores.values())


def test_without_real_pictures_there_is_no_score_that_needs_them() -> None:
    shown = Scene((RED, BLUE), "row", "grey")
    prompts = [{"prompt": "a small red circle left of a large blue square"}]
    made = measure()(pictures([shown]), prompts, 0)
    options = {"prefix": "eval", "resamples": 5, "seed": 0}
    scores, verdicts = score_scenes(made, prompts, None, **options)
    names = ["scene_accuracy", *(f"scene_accuracy/{p}" for p in PARTS), "scene_atoms"]
    names += ["scene_coverage", "clip_scenes"]
    assert list(scores) == [f"eval/{n}" for n in names] and verdicts[0]["right"]


def test_scores_fall_with_the_pictures() -> None:
    rng = np.random.default_rng(12)
    asked = [sample_scene(rng) for _ in range(100)]
    good, _ = score(asked, asked)
    reds = [tuple(replace(t, color="red") for t in s.things) for s in asked]
    one_color = [Scene(things, "row", "black") for things in reds]
    bad, _ = score(one_color, asked)
    assert bad["eval/scene_accuracy"]["high"] < good["eval/scene_accuracy"]["low"]
    assert bad["eval/fd_scenes"]["low"] > 5 * good["eval/fd_scenes"]["value"]
    assert bad["eval/clip_scenes"]["high"] < good["eval/clip_scenes"]["low"]


def test_scores_refuse_lists_that_do_not_belong_together() -> None:
    asked = [{"attributes": a, "prompt": c} for a, c in zip(*fresh()[1:], strict=True)]
    options = {"prefix": "eval", "resamples": 5, "seed": 0}
    made = measure()(fresh()[0][:3], asked[:3], 0)
    with pytest.raises(ValueError, match="do not belong together"):
        score_scenes(made, asked[:2], None, **options)
    one = measure()(fresh()[0][:1], asked[:1], 0)
    with pytest.raises(ValueError, match="at least 2 generated"):
        score_scenes(one, asked[:1], reference(), **options)


def test_clip_finds_the_own_caption(clip: SceneClip) -> None:
    assert retrieval_accuracy(clip, 600) >= 0.95


def test_clip_understands_captions_in_part(clip: SceneClip) -> None:
    samples = list(scenes("partial", 400, seed=17))
    images = to_tensor([s["image"] for s in samples])
    texts = [s["caption"] for s in samples]
    own = clip.cosine(images, texts)
    other = clip.cosine(images, texts[200:] + texts[:200])
    assert (own > other).double().mean() >= 0.95
    # what is left out draws the text to none of its values
    free = {
        "a small red circle left of a large blue square": [
            Scene((RED, BLUE), "row", background) for background in BACKGROUNDS
        ],
        "a red circle left of a large blue square on grey": [
            Scene((replace(RED, size=size), BLUE), "row", "grey") for size in SIZES
        ],
    }
    for text, shown in free.items():
        cosines = clip.cosine(pictures(shown), [text] * len(shown))
        assert cosines.max() - cosines.min() < 0.2


def test_labels_that_a_caption_tells() -> None:
    config = ClassifierConfig()
    whole = text_labels("a small red circle above a large blue square on white", config)
    assert whole == [1, 2, 0, 0, 0, 2, 1, 1]
    part = text_labels("a red circle above a large square", config)
    assert part == [1, IGNORE, 0, 0, IGNORE, IGNORE, 1, 1]
    listed = text_labels("a red circle and a large square on white", config)
    assert listed == [IGNORE, 2, *[IGNORE] * 6]


def test_clip_prefers_the_true_caption_to_a_variant(clip: SceneClip) -> None:
    rng = np.random.default_rng(13)
    shown = [sample_scene(rng) for _ in range(200)]
    images = pictures(shown)
    own = clip.cosine(images, [caption(s, rng) for s in shown])
    other = clip.cosine(images, [caption(variant(s, rng), rng) for s in shown])
    assert (own > other).double().mean() >= 0.9


def test_clip_sees_which_thing_stands_where(clip: SceneClip) -> None:
    rng = np.random.default_rng(15)
    shown = [s for s in (sample_scene(rng) for _ in range(200)) if s.things[0] != s.things[1]]
    images = pictures(shown)
    own = clip.cosine(images, [caption(s, rng) for s in shown])
    turned = [replace(s, things=s.things[::-1]) for s in shown]
    other = clip.cosine(images, [caption(s, rng) for s in turned])
    assert (own > other).double().mean() >= 0.95


def test_training_captions_name_the_second_thing_first_as_often_as_told() -> None:
    rng = np.random.default_rng(16)
    for back in (0, 0.2, 1):
        turned = 0
        for _ in range(300):
            words = training_caption(Scene((RED, BLUE), "row", "grey"), rng, back).split()
            turned += words.index("red") > words.index("blue")
        assert turned / 300 == pytest.approx(back, abs=0.07)
    assert "below" in training_caption(Scene((RED, BLUE, RED), "two above one", "grey"), rng, 0)


def test_clip_knows_every_word_of_every_caption(clip: SceneClip) -> None:
    rng = np.random.default_rng(14)
    for most in (2, 3, 4):
        shown = [sample_scene(rng, most) for _ in range(300)]
        texts = [write(scene, rng) for scene in shown for write in (caption, caption_in_part)]
        context = replace(clip.config, max_objects=most).context
        tokens = tokenize(texts, context)
        assert not (tokens == UNKNOWN).any()
        assert (tokens == END).any(dim=1).all()
        assert (tokens[:, -1] == 0).all()  # none was cut
    long = tokenize(["zebra " * 100], 24)
    assert long[0, -1] == END and (long[0, :-1] == UNKNOWN).all()
    with pytest.raises(ValueError, match="do not pair up"):
        clip.cosine(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["a"])


def test_shipped_weights_are_small_and_say_how_they_were_made() -> None:
    # eval.classifier was eval.judge when the judge was made; another command would be another hash
    made_by = {"clip": "eval.classifier", "judge": "eval.judge", "lpips": "eval.perceptual"}
    files = {f.name.split("-")[0]: f for f in WEIGHTS.glob("*.safetensors")}
    assert files.keys() == made_by.keys()
    assert sum(f.stat().st_size for f in files.values()) <= 3_000_000
    for name, file in files.items():
        command = f"python -m {made_by[name]} --out eval/weights".encode()
        assert command in file.read_bytes()[:20_000]


def test_training_is_a_matter_of_the_settings(tmp_path: Path) -> None:
    config = ClassifierConfig(max_objects=3, width=4, steps=3, batch_size=8)
    first, second = (train_classifier(config) for _ in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    save_classifier(first, tmp_path / "classifier.safetensors")
    again = read_classifier(tmp_path / "classifier.safetensors")
    assert again.config == config and "3 objects" in again.name
    images = fresh(20)[0]
    torch.testing.assert_close(again.read(images)[1], first.read(images)[1], rtol=2e-2, atol=2e-2)


def test_a_classifier_that_does_not_ship_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval import classifier as training

    trained = []

    def train(config: ClassifierConfig) -> Classifier:
        trained.append(config)
        return Classifier(config)

    monkeypatch.setattr(training, "train_classifier", train)
    names = {load_classifier(64, 3, tmp_path).name for _ in range(2)}
    assert len(names) == len(trained) == 1
    assert trained[0].resolution == 64 and trained[0].max_objects == 3
    rows = SceneRows.of(64, 3)
    assert rows.classifier is None and rows.load_classifier("cpu", tmp_path).name in names
    assert load_classifier(32, 2, tmp_path).name != names.pop()
    assert len(trained) == 1
    with pytest.raises(ValueError, match=r"judge-64px-3objects\.safetensors does not ship"):
        load_classifier(64, 3)


def test_clip_comes_back_from_its_file(clip: SceneClip, tmp_path: Path) -> None:
    save_clip(clip, tmp_path / "clip.safetensors")
    again = read_clip(tmp_path / "clip.safetensors")
    images, _, captions = fresh(20)
    torch.testing.assert_close(again.cosine(images, captions), clip.cosine(images, captions))


def test_words_of_a_reading() -> None:
    thing = {"color": "red", "shape": None, "size": "small"}
    read = {"things": [thing, asdict(BLUE)], "layout": "row", "background": "grey"}
    assert in_words(read) == "small red ? left of large blue square on grey"
    assert in_words({"things": [], "layout": None, "background": None}) == "?: nothing on ?"
    assert module.PARTS == ("color", "shape", "size", "relation", "background")
