"""Samplers behind a paper's network: who fits whom, chances, calls, and those who leave."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lightning_modules.common.guidance import Guidance
from lightning_modules.common.request import Request
from lightning_modules.samplers import serve
from lightning_modules.samplers.entropy_bound import within_bound
from lightning_modules.samplers.kernel import Absorbing, Corruption, Uniform
from lightning_modules.samplers.loop import Chances, Rows, lowest, run
from lightning_modules.samplers.renoise import Renoise
from lightning_modules.samplers.settings import NEEDS, Name, SamplerConfig, check_sampler
from tests.samplers.toy import mask_and_replace
from tests.tiny_generators import CAPTIONS, tiny

K, GRID, SEEDS = 7, (3, 4), [4, 9, 2]
LOGITS = torch.randn(12, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3


class Table:
    """Logits that depend on the place, sharper the more tokens are known, by what they are."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(
        self, pictures: Tensor, x: Tensor, time: Tensor, scale: float, keep: Tensor
    ) -> Tensor:
        self.told.append((pictures.tolist(), time.tolist(), scale))
        flat = x.flatten(1).double()
        known = 1 + torch.where(flat < K, flat / 3, 0).sum(1)
        return (LOGITS * known[:, None, None] / 4)[keep.flatten(1)]


def served(name: str, kernel: Corruption, **more: Any) -> tuple[Any, Table]:
    table = Table()
    options = {k: more.pop(k) for k in ("guidance", "temperature") if k in more}
    network = serve.Network(
        table,
        lambda rows: rows,
        kernel,
        options.pop("guidance", Guidance()),
        critic=lambda pictures, x: x.double(),
        **options,
    )
    settings: dict[str, Any] = {"seeds": SEEDS, "steps": 4, "given": None, **more}
    config = settings.pop("config", SamplerConfig(name))  # type: ignore[arg-type]
    generate = settings.pop("generate", torch.ones(len(settings["seeds"]), *GRID, dtype=torch.bool))
    return serve.sample(config, network, generate=generate, **settings), table


NOISE = {"masks": Absorbing(K), "random": Uniform(K)}
BOTH = [
    (name, noise)
    for name in get_args(Name)
    for noise in NOISE
    if name != "own"
    and NEEDS[name].masks in (None, noise == "masks")
    and (noise == "random" or not NEEDS[name].replaces)
]


@pytest.mark.parametrize(("name", "noise"), BOTH)
def test_known_tokens_stay_and_no_mask_does(name: str, noise: str) -> None:
    generate = torch.zeros(3, *GRID, dtype=torch.bool)
    generate[0, 1] = generate[1] = True
    given = torch.arange(36).view(3, *GRID) % K
    config = SamplerConfig(name, corrections=3, eta=0.3 if "remdm" in name else None)  # type: ignore[arg-type]
    found, _ = served(name, NOISE[noise], generate=generate, given=given, config=config)
    assert torch.equal(found.tokens[~generate], given[~generate])
    assert int(found.tokens.max()) < K and int(found.tokens.min()) >= 0
    assert int(found.calls[2]) == 0  # nothing of it is generated
    assert int(found.calls[1]) > 0


@pytest.mark.parametrize(("name", "noise"), BOTH)
def test_a_picture_does_not_hang_on_its_batch(name: str, noise: str) -> None:
    whole, _ = served(name, NOISE[noise])
    alone, _ = served(name, NOISE[noise], seeds=[9])
    assert torch.equal(alone.tokens[0], whole.tokens[1])
    assert int(alone.calls[0]) == int(whole.calls[1])


def test_finished_pictures_leave_the_batch() -> None:
    config = SamplerConfig("eb", gamma=1.5)
    seeds = list(range(12))
    found, table = served("eb", NOISE["masks"], seeds=seeds, config=config)
    sizes = [len(pictures) for pictures, _, _ in table.told]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 12 > sizes[-1]
    assert sum(sizes) == int(found.calls.sum()) and found.calls.unique().numel() > 1


def test_the_uniform_form_of_the_entropy_bound_stops_when_it_is_calm() -> None:
    cold, _ = served("eb", NOISE["random"], temperature=(1e-4, 1e-4))
    assert bool((cold.calls < 6).all()) and bool((cold.calls >= 2).all())
    assert torch.equal(cold.tokens, LOGITS.argmax(1).view(GRID).expand(3, -1, -1))
    config = SamplerConfig("eb", limit=3)
    warm, table = served("eb", NOISE["random"], temperature=(5.0, 5.0), config=config)
    assert warm.calls.tolist() == [3, 3, 3]
    times = [time for _, time, _ in table.told]
    assert times[0] == [1, 1, 1] and all(0 < t < 1 for t in times[1])


def test_the_network_is_told_the_time_and_guided_along_the_way() -> None:
    _, table = served("renoise_rand", NOISE["random"], guidance=Guidance(1, 4))
    assert [time[0] for _, time, _ in table.told] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [scale for _, _, scale in table.told] == pytest.approx([1, 2, 3, 4])
    for law, ends in (("linspace", 3), ("ratio", 4), ("cosine", 4)):
        guidance = Guidance(0.5, 4, law)  # type: ignore[arg-type]
        for name, noise in (("flow", "random"), ("posterior", "masks"), ("gidd", "random")):
            _, table = served(name, NOISE[noise], guidance=guidance)
            scales = [scale for _, _, scale in table.told][:4]
            assert scales == pytest.approx(guidance.scales(4)), (law, name)
            assert (scales[-1] == pytest.approx(4)) == (ends == 3)
    _, table = served("random", mask_and_replace(0.0, 8, K))
    assert [time[0] for _, time, _ in table.told] == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("mode", ["start", "prev", "rand"])
def test_renoising_is_paellas(mode: Any) -> None:
    """The member of the family against the paper's own loop, with the same chances."""
    from lightning_modules.paella import process

    steps, n = 5, 12
    generator = torch.Generator().manual_seed(2)
    start = torch.randint(K, (2, n), generator=generator)
    u = torch.rand(steps, 3, 2, n, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, K, K, generator=generator, dtype=torch.float64)

    def logits(x: Tensor, t: Tensor) -> Tensor:  # each token depends on the one before it
        rows = weight[torch.arange(n), x.roll(1, 1)]
        return rows * (2 - t[:, None, None])

    def predict(pictures: Tensor, x: Tensor, t: Tensor, done: Tensor, keep: Tensor) -> Rows:
        rows = logits(x, t)[keep]
        return Rows(rows, lambda r: r, torch.full((len(rows),), 0.7, dtype=torch.float64))

    everywhere = torch.ones_like(start, dtype=torch.bool)
    chances = iter(u)
    found = run(
        Renoise(Uniform(K), steps, mode), predict, start, everywhere, lambda p, s: next(chances)
    )
    fresh = (u[:, 2] * K).long()
    expected = process.sample(
        lambda x, t, w, keep: logits(x.flatten(1), t).view(2, 3, 4, K)[keep],
        lambda rows: rows,
        init_noise=start.view(2, 3, 4),
        uniform_renoise=u[:, 1].view(steps, 2, 3, 4),
        draws=u[:, 0].view(steps, 2, 3, 4),
        random_tokens=fresh.view(steps, 2, 3, 4),
        times=torch.linspace(1, 0, steps + 1)[:-1],
        renoise_probability=torch.linspace(1, 0, steps + 1)[1:],
        renoise_steps=steps - 1,
        renoise_mode=mode,
        temperature=0.7,
    )
    assert torch.equal(found.tokens.view(2, 3, 4), expected)


def test_the_temperature_ends_at_the_last_step() -> None:
    heats: list[Tensor] = []

    original = Rows.draw

    def draw(rows: Rows, uniforms: Tensor) -> Tensor:
        heats.append(rows.heat)
        return original(rows, uniforms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "draw", draw)
        served("flow", NOISE["random"], temperature=(1.0, 0.1))
    assert [float(h[0]) for h in heats] == pytest.approx([1.0, 0.7, 0.4, 0.1])


def test_chances_are_the_pictures_own() -> None:
    both, one = Chances([3, 8], 5), Chances([8], 5)
    first = both(torch.tensor([0, 1]), 2)
    assert torch.equal(first[:, 1:], one(torch.tensor([0]), 2))
    # the second one sat out a step: its next uniforms are those that it would have had
    both(torch.tensor([0]), 2)
    assert torch.equal(both(torch.tensor([1]), 2), one(torch.tensor([0]), 2))


def test_the_bound_takes_the_longest_prefix() -> None:
    h = torch.tensor([[0.3, 0.05, 0.2, 0.0], [0.3, 0.05, 0.2, 0.0]])
    candidates = torch.tensor([[True] * 4, [True, True, False, True]])
    # sorted 0, .05, .2, .3: sums without the largest 0, 0, .05, .25
    assert within_bound(h, candidates, 0.1).tolist() == [
        [False, True, True, True],
        [True, True, False, True],
    ]
    assert within_bound(h, candidates, 0.0).sum(1).tolist() == [2, 2]
    assert not within_bound(h, torch.zeros_like(candidates), 9.0).any()


def test_lowest_never_takes_what_is_no_candidate() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    candidates = torch.tensor([[False, True, True]])
    assert lowest(scores, candidates, torch.tensor([3])).tolist() == [[False, True, True]]


# Who fits whom ----


def test_every_sampler_says_what_it_needs() -> None:
    assert set(NEEDS) == set(get_args(Name))
    readers = {name for name, need in NEEDS.items() if need.visible}
    assert readers == {"gibbs", "gidd", "p2"}


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("muse", "p2", "reads the network at visible tokens: with objective.visible_weight=0 this"),
        ("muse", "critic", r"without a Token-Critic \(critic.layers=0\)"),
        ("muse", "p2_critic", r"without a Token-Critic"),
        ("muse", "gidd", "mends wrong tokens: this checkpoint's noise makes none"),
        (
            "muse",
            "renoise_start",
            "whose noise is masks; it can be one of own,",
        ),
        ("vq_diffusion", "gibbs", "mends wrong tokens"),
        ("vq_diffusion causal", "eb", "be own with model.causal, got eb"),
        ("paella", "margin", "not for a checkpoint whose noise is random tokens"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(kind: str, name: str, words: str) -> None:
    module = tiny(kind)
    settings = module.settings({"sampler": {"name": name}})
    with pytest.raises(ValueError, match=rf"^sampling\.sampler must .*{words}") as error:
        module.sample_tokens(Request(CAPTIONS, [1, 2, 3, 4]), settings)
    assert "\n" not in str(error.value)


def test_a_refusal_names_only_what_fits() -> None:
    with pytest.raises(ValueError) as error:
        check_sampler(SamplerConfig("p2"), masks=True, replaces=False, untrained="x=0")
    offered = str(error.value).partition("it can be one of ")[2].split(", ")
    for name in offered:
        check_sampler(SamplerConfig(name), masks=True, replaces=False, untrained="x=0")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -0.1}, "gamma must be at least 0"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"sure": 1.5}, "sure must be from 0 to 1"),
        ({"choice_heat": 0.0}, "choice_heat must be positive or null"),
        ({"temperature": 0.8}, "temperature must be null with sampler=own"),
        ({"name": "remdm_rescale", "eta": 1.5}, "eta must be at most 1 with sampler=remdm_rescale"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplerConfig(**settings)


def test_calls_of_every_loop_are_counted() -> None:
    for kind, changes, calls in (
        ("muse", {}, 4),
        ("paella", {}, 4),
        ("muse", {"sampler": {"name": "random"}}, 4),
        ("paella", {"sampler": {"name": "gibbs"}}, 4 + 3),
        ("vq_diffusion causal", {}, 16),
    ):
        module = tiny(kind, 0.3)
        request = Request(CAPTIONS, [1, 2, 3, 4])
        for _ in range(2):
            module.sample_tokens(request, module.settings(changes))
            assert module.calls.tolist() == [calls] * 4, (kind, changes)


@pytest.mark.parametrize("kind", ["muse", "paella", "vq_diffusion", "improved_vqd"])
def test_who_listens_hears_every_call(kind: str) -> None:
    """In the paper's loop and in another: calls add up, and each place has its features."""
    module = tiny(kind)
    for name in ("own", "posterior"):
        heard = torch.zeros(4, dtype=torch.int64)

        def on_call(
            pictures: Tensor, places: Tensor | None, rows: Tensor, heard: Tensor = heard
        ) -> None:
            heard[pictures] += 1
            assert places is not None and int(places.sum()) == len(rows)
            assert len(places) == len(pictures) and rows.shape[1] > 1

        settings = module.settings({"sampler": {"name": name}})
        with module.heard_by(on_call):
            module.sample_tokens(Request(CAPTIONS, [1, 2, 3, 4]), settings)
        assert torch.equal(heard, module.calls), name
        assert module.on_call is None


def test_settings_of_an_older_checkpoint_mean_the_papers_loop() -> None:
    module = tiny("muse")
    old = {k: v for k, v in dataclasses.asdict(module.config.sampling).items() if k != "sampler"}
    assert module.settings(old).sampler.own


# Guidance that is not normalised ----


class Pair(Table):
    """Two sides of a guidance: their own logits at every place."""

    def __call__(
        self, pictures: Tensor, x: Tensor, time: Tensor, scale: float, keep: Tensor
    ) -> Tensor:
        own, null = LOGITS, LOGITS.flip(0)
        return (null + scale * (own - null)).expand(len(x), -1, -1)[keep.flatten(1)]


def test_the_sum_of_the_guided_law_scales_how_fast_masks_open() -> None:
    w, seeds = 1.5, list(range(400))
    guidance = dataclasses.replace(Guidance.constant(w), normalised=False)
    log_own, log_null = LOGITS.log_softmax(1), LOGITS.flip(0).log_softmax(1)
    mass = (w * log_own + (1 - w) * log_null).exp().sum(1)  # [N]
    first: list[Tensor] = []
    network = serve.Network(Pair(), lambda rows: rows, NOISE["masks"], guidance)
    everywhere = torch.ones(400, *GRID, dtype=torch.bool)
    found = serve.sample(
        SamplerConfig("posterior"),
        network,
        seeds=seeds,
        steps=6,
        given=None,
        generate=everywhere,
        on_step=lambda i, x, out: first.append(out) if i == 0 else None,
    )
    opened = (first[0] != K).flatten(1).double().mean(0)
    expected = (mass / 6).clamp(max=1)
    assert float((opened - expected).abs().max()) < 0.1 < float((expected - 1 / 6).abs().max())
    assert int(found.tokens.max()) < K  # the last step opens the rest


def test_only_the_posterior_reads_the_sum() -> None:
    module = tiny("muse")
    with pytest.raises(ValueError, match=r"^guidance_normalised must be true with sampler=own"):
        module.settings({"guidance_normalised": False})
    settings = module.settings({"guidance_normalised": False, "sampler": {"name": "posterior"}})
    assert module.sample_tokens(Request(CAPTIONS, [1, 2, 3, 4]), settings).max() < 12
