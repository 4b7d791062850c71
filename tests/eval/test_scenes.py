import itertools
from dataclasses import asdict, replace
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.scenes import Scene, Thing, caption, draw_scene, place, sample_scene
from eval import scenes as module
from eval.classifier import reading_accuracy, load_classifier, train_classifier
from eval.classifier_data import broken_sample, fresh_scenes, to_tensor, wear
from eval.classifier_network import WEIGHTS, Classifier, ClassifierConfig, read_classifier, save_classifier, shrink
from eval.scene_clip import (
    END,
    UNKNOWN,
    SceneClip,
    load_clip,
    read_clip,
    retrieval_accuracy,
    save_clip,
    tokenize,
    training_caption,
    variant,
)
from eval.scenes import PARTS, compare, in_words, score_scenes

RED, BLUE = Thing("red", "circle", "small"), Thing("blue", "square", "large")


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


def score(
    classifier: Classifier, clip: SceneClip, shown: list[Scene], asked: list[Scene]
) -> tuple[dict, list[dict]]:
    rng = np.random.default_rng(6)
    images, _, captions = fresh()
    return score_scenes(
        pictures(shown),
        [asdict(s) for s in asked],
        [caption(s, rng) for s in asked],
        classifier=classifier,
        clip=clip,
        real_images=images,
        real_captions=captions,
        resamples=50,
    )


def test_reads_fresh_scenes(classifier: Classifier) -> None:
    # val and heldout by halves, of a seed that training never saw
    assert reading_accuracy(classifier, 1000) >= 0.99


def test_reads_worn_and_jpeg_pictures(classifier: Classifier) -> None:
    images, attributes, _ = fresh()
    truth = torch.tensor([classifier.encode(a) for a in attributes])
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
    labels = classifier.encode(asdict(scene))
    assert Scene.from_attributes(classifier.decode(labels)) == scene
    with pytest.raises(ValueError, match="at most 2"):
        classifier.encode(asdict(Scene((RED, BLUE, RED), "two above one", "grey")))
    with pytest.raises(ValueError, match="'pink'"):
        classifier.encode(asdict(Scene((RED, BLUE), "row", "pink")))


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
        (Scene((replace(RED, size="large"), BLUE), "row", "grey"), ["size"]),
        (Scene((replace(RED, size="large"), BLUE), "column", "black"),
         ["size", "relation", "background"]),
    ],
)  # fmt: skip
def test_verdict_names_exactly_the_planted_error(
    classifier: Classifier, clip: SceneClip, shown: Scene, wrong: list[str]
) -> None:
    asked = Scene((RED, BLUE), "row", "grey")
    scores, verdicts = score(classifier, clip, [shown] * 4, [asked] * 4)
    for verdict in verdicts:
        assert verdict["wrong"] == wrong
        assert verdict["right"] == (not wrong)
        assert Scene.from_attributes(verdict["read"]) == shown
    assert scores["eval/scene_accuracy"]["value"] == (not wrong)
    for part in PARTS:
        value = scores[f"eval/scene_accuracy/{part}"]["value"]
        assert value == 1 if part not in wrong else value < 1


def test_things_alike_may_swap_places() -> None:
    config = ClassifierConfig()
    classifier = Classifier(config)
    twins = Scene((RED, RED), "row", "grey")
    labels = torch.tensor([classifier.encode(asdict(twins))])
    assert all(float(v) == 1 for v in compare(labels, labels).values())


def test_unread_things_agree_with_nothing() -> None:
    classifier = Classifier(ClassifierConfig())
    truth = torch.tensor([classifier.encode(asdict(Scene((RED, BLUE), "row", "grey")))])
    none = torch.tensor([[len(o) for o in classifier.config.heads]])
    assert all(float(v) == 0 for v in compare(none, truth).values())
    # only the second asked thing is there, read in the first slot: it counts, its place does not
    one = none.clone()
    one[:, 2:5] = truth[:, 5:8]
    parts = compare(one, truth)
    assert [float(parts[p]) for p in PARTS] == [0.5, 0.5, 0.5, 0, 0]


def test_fewer_things_than_slots() -> None:
    classifier = Classifier(ClassifierConfig(max_objects=4))
    rng = np.random.default_rng(0)
    asked = [sample_scene(rng, 4) for _ in range(50)]
    truth = torch.tensor([classifier.encode(asdict(s)) for s in asked])
    assert all((v == 1).all() for v in compare(truth, truth).values())
    swapped = [replace(s, things=s.things[::-1]) for s in asked]
    parts = compare(torch.tensor([classifier.encode(asdict(s)) for s in swapped]), truth)
    for index, (a, b) in enumerate(zip(asked, swapped, strict=True)):
        assert parts["color"][index] == parts["shape"][index] == parts["size"][index] == 1
        assert parts["relation"][index] == (a.things == b.things)


def test_best_assignment_equals_a_plain_search() -> None:
    classifier = Classifier(ClassifierConfig(max_objects=3))
    rng = np.random.default_rng(1)
    asked, read = ([sample_scene(rng, 3) for _ in range(60)] for _ in range(2))
    parts = compare(*(torch.tensor([classifier.encode(asdict(s)) for s in side])
                      for side in (read, asked)))  # fmt: skip
    for index, (r, a) in enumerate(zip(read, asked, strict=True)):
        things = [*r.things, *[None] * (3 - len(r.things))]
        most = max(
            sum(getattr(x, k) == getattr(y, k) for x, y in zip(order, a.things, strict=False)
                if x for k in ("color", "shape", "size"))
            for order in itertools.permutations(things)
        )  # fmt: skip
        ours = sum(float(parts[k][index]) for k in ("color", "shape", "size")) * len(a.things)
        assert ours == pytest.approx(most)


def test_real_pictures_score_at_the_floor(classifier: Classifier, clip: SceneClip) -> None:
    _, others, _ = fresh_scenes(400, ClassifierConfig(), seed=32)
    shown = [Scene.from_attributes(a) for a in others[::2]]
    scores, _ = score(classifier, clip, shown, shown)
    assert scores["eval/scene_accuracy"]["value"] >= 0.98
    fd, floor = scores["eval/fd_scenes"], scores["eval/fd_scenes_floor"]
    assert fd["n"] == floor["n"] == 200
    assert fd["value"] < 2 * floor["value"]
    assert fd["low"] < fd["value"] < fd["high"]
    assert scores["eval/clip_scenes"]["value"] == pytest.approx(
        scores["eval/clip_scenes_real"]["value"], abs=0.03
    )
    assert "classifier" in fd["model"] and "CLIP" in scores["eval/clip_scenes"]["model"]


def test_scores_fall_with_the_pictures(classifier: Classifier, clip: SceneClip) -> None:
    rng = np.random.default_rng(12)
    asked = [sample_scene(rng) for _ in range(100)]
    good, _ = score(classifier, clip, asked, asked)
    one_color = [Scene(tuple(replace(t, color="red") for t in s.things), "row", "black")
                 for s in asked]  # fmt: skip
    bad, _ = score(classifier, clip, one_color, asked)
    assert bad["eval/scene_accuracy"]["high"] < good["eval/scene_accuracy"]["low"]
    assert bad["eval/fd_scenes"]["low"] > 5 * good["eval/fd_scenes"]["value"]
    assert bad["eval/clip_scenes"]["high"] < good["eval/clip_scenes"]["low"]


def test_scores_refuse_lists_that_do_not_belong_together(classifier: Classifier, clip: SceneClip) -> None:
    images, attributes, captions = fresh()
    real = {"classifier": classifier, "clip": clip, "real_images": images, "real_captions": captions}
    with pytest.raises(ValueError, match="do not belong together"):
        score_scenes(images[:3], attributes[:2], captions[:3], **real)
    with pytest.raises(ValueError, match="at least 2 generated"):
        score_scenes(images[:1], attributes[:1], captions[:1], **real)


def test_clip_finds_the_own_caption(clip: SceneClip) -> None:
    assert retrieval_accuracy(clip, 600) >= 0.95


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
    for share in (0, 0.2, 1):
        turned = 0
        for _ in range(300):
            words = training_caption(Scene((RED, BLUE), "row", "grey"), rng, share).split()
            turned += words.index("red") > words.index("blue")
        assert turned / 300 == pytest.approx(share, abs=0.07)
    assert "below" in training_caption(Scene((RED, BLUE, RED), "two above one", "grey"), rng, 0)


def test_clip_knows_every_word_of_every_caption(clip: SceneClip) -> None:
    rng = np.random.default_rng(14)
    for most in (2, 3, 4):
        texts = [caption(sample_scene(rng, most), rng) for _ in range(300)]
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
    made_by = {"clip": "eval.classifier", "classifier": "eval.classifier", "lpips": "eval.perceptual"}
    files = {f.name.split("-")[0]: f for f in WEIGHTS.glob("*.safetensors")}
    assert files.keys() == made_by.keys()
    assert sum(f.stat().st_size for f in files.values()) <= 3_000_000
    for name, file in files.items():
        command = f"python -m {made_by[name]} --out eval/weights".encode()
        assert command in file.read_bytes()[:20_000]


def test_training_is_a_matter_of_the_settings(tmp_path: Path) -> None:
    config = ClassifierConfig(max_objects=3, width=4, steps=3, batch_size=8)
    first, second = (train_classifier(config, quiet=True) for _ in range(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    save_classifier(first, tmp_path / "classifier.safetensors")
    again = read_classifier(tmp_path / "classifier.safetensors")
    assert again.config == config and "3 objects" in again.name
    images = fresh(20)[0]
    torch.testing.assert_close(again.read(images)[1], first.read(images)[1], rtol=2e-2, atol=2e-2)


def test_a_judge_that_is_not_shipped_is_trained_once(
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
    assert load_classifier(32, 2, tmp_path).name != names.pop()
    assert len(trained) == 1


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
