"""Masking, counting and decoding: laws that hold for every setting, and exactness."""

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from lightning_modules.muse import process
from lightning_modules.muse.config import (
    PRESETS,
    SCHEDULES,
    Counting,
    DecodeConfig,
    ObjectiveConfig,
)
from lightning_modules.samplers import ordered
from lightning_modules.samplers.loop import gumbel

K, MASK = 6, 6
GRID = (3, 4)


class Network:
    """Logits that depend on every visible token, and a count of the rows that were asked for."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(K + 1, 5, generator=generator)
        self.output = torch.randn(5, K, generator=generator)
        self.rows: list[int] = []
        self.weights: list[float] = []
        self.headed = 0

    def predict(self, x: Tensor, weight: float, keep: Tensor) -> Tensor:
        self.weights.append(weight)
        self.rows.append(int(keep.sum()))
        places = torch.linspace(-1, 1, x[0].numel()).view(1, *x.shape[1:], 1)
        features = self.table[x].mean((1, 2), keepdim=True) * 3 + places + 0 * self.table[x]
        return features[keep]

    def head(self, rows: Tensor) -> Tensor:
        self.headed += len(rows)
        return rows @ self.output


def seeds(n: int) -> list[int]:
    return [100 + i for i in range(n)]


def decode(network: Network, start: Tensor, config: DecodeConfig, **more: Any) -> Tensor:
    unknown = (start == MASK).flatten(1).sum(1)
    names = seeds(len(start))
    if config.order == "halton":
        more["ranks"] = ordered.halton_ranks(GRID, names, "grid")
    if config.order == "critic":
        more.setdefault("critic", lambda x: torch.sin(x.float() * 7))
    noise = process.sample_noise(names, config.steps - config.first_step, GRID)
    return process.decode(
        network.predict,
        network.head,
        start=start,
        mask_id=MASK,
        **noise,
        **process.loop_settings(config, unknown),
        **more,
    )


def masks(n: int = 3) -> Tensor:
    return torch.full((n, *GRID), MASK)


# Counting ----


@given(
    unknown=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    steps=st.integers(1, 40),
    schedule=st.sampled_from([*SCHEDULES, "pow2.5", "pow0.01", "pow300"]),
    counting=st.sampled_from(get_args(Counting)),
    first=st.integers(0, 39),
)
@settings(deadline=None, max_examples=300)
def test_counts_fall_to_zero(unknown, steps, schedule, counting, first):
    first = min(first, steps - 1)
    counts = process.mask_counts(torch.tensor(unknown), steps, schedule, counting, first_step=first)
    left = torch.cat([torch.tensor([unknown]), counts])
    opened = left[:-1] - left[1:]
    assert counts.shape == (steps - first, len(unknown)) and counts.dtype == torch.int64
    assert bool((opened >= 0).all()) and bool((counts >= 0).all())
    assert counts[-1].tolist() == [0] * len(unknown)
    assert opened.sum(0).tolist() == unknown
    if counting == "strict":  # no step opens zero while a token is masked
        assert bool(((opened >= 1) | (left[:-1] == 0)).all())
    if counting == "maskgit":  # only the very last token may wait for the end
        assert bool(((opened >= 1) | (left[:-1] <= 1)).all())


@given(n=st.integers(1, 300), steps=st.integers(1, 40))
@settings(deadline=None)
def test_strict_and_maskgit_agree_where_maskgit_never_waits(n, steps):
    ours, theirs = (
        process.mask_counts(torch.tensor([n]), steps, "cosine", c)[:, 0]
        for c in ("strict", "maskgit")
    )
    opened = torch.cat([torch.tensor([n]), theirs])
    if bool((opened[:-1] > opened[1:]).all()):
        assert ours.tolist() == theirs.tolist()


def test_float32_decides_at_two_thirds():
    assert process.mask_counts(torch.tensor([256]), 12)[:, 0].tolist() == [
        253,
        247,
        236,
        221,
        203,
        181,
        155,
        127,
        97,
        66,
        33,
        0,
    ]


@pytest.mark.parametrize("schedule", [*SCHEDULES, "pow2.5"])
def test_schedules_fall_from_all_to_none(schedule):
    ratio = process.mask_ratio(schedule, torch.linspace(0, 1, 50), 256)
    assert bool((ratio.diff() <= 0).all())
    assert ratio[0] > 0.99 and 0 < ratio[-1] <= 1e-5
    concave = {"cosine", "square", "cubic", "linear", "exp", "arccos", "pow2.5"}
    assert (ratio[25] >= 0.47) == (schedule in concave)


@pytest.mark.parametrize(
    ("name", "other"),
    [("linear", "pow1"), ("square", "pow2.0"), ("cubic", "pow3"), ("sqrt", "pow.5")],
)
def test_named_powers(name: str, other: str) -> None:
    r = torch.linspace(0, 1, 50)
    assert torch.equal(process.mask_ratio(name, r), process.mask_ratio(other, r))


def test_any_power_in_decoding_and_training() -> None:
    r = torch.linspace(0, 0.99, 50)
    expected = 1 - r.double() ** 2.5
    torch.testing.assert_close(
        process.mask_ratio("pow2.5", r).double(), expected, atol=1e-6, rtol=0
    )
    # floor(256 (1 - (s / 8)^2.5)), the float32 of MaskGIT's mask_schedule.py
    assert process.mask_counts(torch.tensor([256]), 8, "pow2.5", "maskgit")[:, 0].tolist() == [
        254,
        248,
        233,
        210,
        176,
        131,
        72,
        0,
    ]
    assert torch.equal(process.masked_rate(r, "pow2.5"), process.mask_ratio("pow2.5", r))
    assert ObjectiveConfig(mask_law="pow2.5").mask_law == "pow2.5"


@pytest.mark.parametrize(
    "name",
    [
        "pow",
        "pow0",
        "pow-1",
        "pow1e3",
        "pownan",
        "pow" + "9" * 400,
        "pow2.5x",
        "powder",
        "Cosine",
        "",
    ],
)
def test_other_schedules_are_refused(name: str) -> None:
    for setting, make in (("schedule", DecodeConfig), ("mask_law", ObjectiveConfig)):
        with pytest.raises(ValueError, match=rf"^{setting} must be one of cosine, .* or pow<p>: "):
            make(**{setting: name})


def test_law_of_the_masked_share():
    u = (torch.arange(100_000) + 0.5) / 100_000
    cases = {"cosine": (0.157, 0.708, 0.988), "arccos": (0.287, 0.667, 0.936)}
    for law, quantiles in cases.items():
        rates = process.masked_rate(u, law)
        assert rates.mean().item() == pytest.approx(2 / math.pi, abs=1e-4)
        found = rates.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        assert [round(q, 2) for q in found] == [round(q, 2) for q in quantiles] or found == (
            pytest.approx(quantiles, abs=3e-3)
        )
    assert process.masked_rate(u, "cosine", min_rate=0.5).min() == 0.5


def test_scattered_mask_has_its_number_and_is_uniform():
    number = torch.arange(12) % 12 + 1
    uniforms = torch.rand(2000, 12, *GRID, generator=torch.Generator().manual_seed(0))
    found = torch.stack([process.scattered_mask(number, u) for u in uniforms])
    assert torch.equal(found.flatten(2).sum(2), number.expand(2000, -1))
    share = found.float().mean(0)  # [12, h, w]
    assert (share - (number / 12)[:, None, None]).abs().max() < 0.06


@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    data=st.data(),
    u=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
@settings(deadline=None)
def test_rectangle(h, w, data, u):
    n = data.draw(st.integers(1, h * w))
    uniforms = torch.tensor([u], dtype=torch.float32).clamp(max=1 - 1e-6)
    mask = process.rectangle_mask(torch.tensor([n]), (h, w), uniforms)[0]
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    assert int(mask.sum()) == len(rows) * len(columns)  # all of a box
    assert len(rows) == rows[-1] - rows[0] + 1 and len(columns) == columns[-1] - columns[0] + 1
    assert n <= int(mask.sum()) < n + len(rows)


def test_weights_of_visible_tokens():
    mask = torch.tensor([[[True, False]], [[False, False]]])
    rates = torch.tensor([0.5, 1.0])
    assert process.loss_weight(mask, rates).flatten().tolist() == [1, 0, 0, 0]
    assert process.loss_weight(mask, rates, 0.25).flatten().tolist() == [1, 0.25, 0.25, 0.25]
    assert process.loss_weight(mask, rates, 0.5, rises=True).flatten().tolist() == [1, 0.75, 1, 1]


def test_reductions_differ_where_samples_do():
    ce = torch.tensor([[1.0, 1.0, 1.0], [4.0, 9.0, 9.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert process.masked_loss(ce, weight).item() == pytest.approx(7 / 4)
    assert process.masked_loss(ce, weight, "samples").item() == pytest.approx(5 / 2)


# Laws of each step ----


def config(**more: Any) -> DecodeConfig:
    return DecodeConfig(**{"steps": 5, **more})


def test_choice_temperatures():
    assert process.choice_temperatures(config()) == pytest.approx([3.6, 2.7, 1.8, 0.9, 0])
    linear = config(choice_law="linspace", choice_temperature=2, choice_end=0.0)
    assert process.choice_temperatures(linear) == pytest.approx([2, 1.5, 1, 0.5, 0])
    compound = config(choice_law="compound", choice_temperature=1.0)
    assert process.choice_temperatures(compound) == pytest.approx([0.8, 0.48, 0.192, 0.0384, 0])


def test_guidance_scales():
    rising = config(guidance_start=1, guidance_end=5)
    assert process.guidance_scales(rising) == pytest.approx([1, 2, 3, 4, 5])
    by_ratio = config(guidance_start=1, guidance_end=11, guidance_law="ratio")
    assert process.guidance_scales(by_ratio) == pytest.approx([1, 3, 5, 7, 9])
    cosine = config(guidance_start=1, guidance_end=3, guidance_law="cosine", steps=4)
    half = math.sqrt(0.5)
    assert process.guidance_scales(cosine) == pytest.approx([1, 2 - half, 2, 2 + half])
    assert process.guidance_scales(PRESETS["amused"]) == [10.0] * 12


def test_scales_reach_the_network():
    network = Network()
    decode(network, masks(), config(guidance_start=1, guidance_end=5))
    assert network.weights == pytest.approx([1, 2, 3, 4, 5])


def test_tied_temperatures():
    loop = process.loop_settings(config(tie_temperatures=True), torch.tensor([12]))
    assert loop["temperature"] == loop["choice_temperature"]
    free = process.loop_settings(config(temperature_end=0.5, first_step=2), torch.tensor([12]))
    assert free["temperature"] == pytest.approx([0.75, 0.625, 0.5])


# The loop ----

ORDERS: list[dict[str, Any]] = [
    {},
    {"order": "random"},
    {"order": "halton", "schedule": "arccos", "counting": "halton"},
    {"order": "critic"},
    {"order": "critic", "frozen": False},
    {"frozen": False},
    {"confidence": "logit", "tie_temperatures": True},
    {"confidence": "tempered"},
    {"top_k": 2, "temperature_end": 0.0},
    {"counting": "maskgit", "schedule": "log"},
    {"counting": "lucidrains", "choice_temperature": 0.0},
    {"first_step": 2},
]


@pytest.mark.parametrize("options", ORDERS, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_known_tokens_stay_and_nothing_stays_masked(options, steps):
    options = {**options, "first_step": min(options.get("first_step", 0), steps - 1)}
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(K, (4, *GRID), generator=generator)
    hidden = torch.rand(start.shape, generator=generator) < 0.6
    hidden[0], hidden[1] = True, False
    start = start.masked_fill(hidden, MASK)
    states: list[Tensor] = [start]

    def on_step(i: int, before: Tensor, after: Tensor) -> None:
        assert i == len(states) - 1 and torch.equal(before, states[-1])
        states.append(after)

    setting = config(**{**options, "steps": steps})
    out = decode(Network(), start, setting, on_step=on_step)
    assert torch.equal(out[~hidden], start[~hidden])
    assert bool((out < K).all()) and torch.equal(out, states[-1])
    left = torch.stack([(s == MASK).flatten(1).sum(1) for s in states])
    counts = process.loop_settings(setting, left[0])["counts"]
    assert torch.equal(left[1:], counts)
    for before, after in itertools.pairwise(states):
        opened_before = (before != MASK) & hidden
        if setting.frozen:
            assert torch.equal(after[opened_before], before[opened_before])


def test_tokens_can_be_masked_again():
    states: list[Tensor] = []
    again = config(frozen=False, choice_temperature=20.0, steps=8)
    decode(Network(), masks(8), again, on_step=lambda i, a, b: states.append(b))
    masked_again = [bool(((a != MASK) & (b == MASK)).any()) for a, b in itertools.pairwise(states)]
    assert any(masked_again)


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_only_what_is_needed_is_predicted(order):
    network = Network()
    setting = config(order=order, steps=4)
    decode(network, masks(2), setting)
    left = torch.cat([torch.tensor([[12, 12]]), process.mask_counts(torch.tensor([12, 12]), 4)])
    expected = left[:-1] if order == "confidence" else left[:-1] - left[1:]
    assert network.rows == expected.sum(1).tolist()
    assert network.headed == sum(network.rows)


def test_no_pass_once_all_is_known():
    network = Network()
    start = torch.zeros(1, *GRID, dtype=torch.int64)
    start[0, 0, :2] = MASK
    decode(network, start, config(steps=20))
    assert network.rows == [2, 1]


def test_same_tokens_as_a_plain_loop():
    """Full logits, full softmax, one draw per token by the plain inverse CDF, whole sorting."""
    network, names = Network(3), seeds(3)
    setting = config(steps=6, counting="maskgit", temperature_end=0.7, top_k=4)
    noise = process.sample_noise(names, 6, GRID)
    x, everywhere = masks(3), torch.ones(3, *GRID, dtype=torch.bool)
    heat = torch.linspace(1, 0.7, 6)
    counts = process.mask_counts(torch.full((3,), 12), 6)
    for i in range(6):
        logits = network.head(network.predict(x, 1.0, everywhere)).view(3, 12, K)
        cut = logits.topk(4, dim=-1).values[..., -1:]
        chosen = (logits / heat[i]).masked_fill(logits < cut, -torch.inf).softmax(-1)
        u = noise["draws"][i].flatten(1)[..., None]
        tokens = (chosen.cumsum(-1) <= u).sum(-1)
        masked = (x == MASK).flatten(1)
        tokens = torch.where(masked, tokens, x.flatten(1))
        sure = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        sure += setting.choice_temperature * (1 - (i + 1) / 6) * noise["choice_noise"][i].flatten(1)
        sure[~masked] = torch.inf
        for image in range(3):
            worst = sure[image].argsort()[: counts[i, image]]
            tokens[image, worst] = MASK
        x = tokens.view(3, *GRID)
    assert torch.equal(decode(network, masks(3), setting), x)


def test_images_do_not_depend_on_their_batch():
    alone = [process.sample_noise([s], 4, GRID) for s in seeds(3)]
    together = process.sample_noise(seeds(3), 4, GRID)
    for name, value in together.items():
        assert torch.equal(value, torch.cat([a[name] for a in alone], dim=1))
    assert together["draws"].shape == (4, 3, *GRID)


def test_gumbel_is_finite_and_gumbel():
    assert bool(gumbel(torch.tensor([0.0, 1e-30, 1 - 2**-24])).isfinite().all())
    noise = process.sample_noise([0], 4000, GRID)["choice_noise"]
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.06)


def test_missing_parts_are_named():
    for order, what in (("halton", "ranks"), ("random", "choice_noise"), ("critic", "critic")):
        with pytest.raises(ValueError, match=what):
            process.decode(
                Network().predict,
                Network().head,
                start=masks(),
                mask_id=MASK,
                order=order,
                counts=torch.zeros(1, 3, dtype=torch.int64),
                draws=torch.rand(1, 3, *GRID),
            )


def test_top_k():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert (process.top_k_filter(logits, 2).isfinite().sum(1) == 2).all()
    assert process.top_k_filter(logits, 3)[0].tolist() == [-math.inf, 3, 2, 3]
    assert torch.equal(process.top_k_filter(logits, 9), logits)


# Orders ----


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (9, 9), (27, 16), (64, 64)])
def test_halton_visits_every_cell_once(grid):
    order = ordered.halton_order(*grid)
    assert len({tuple(cell) for cell in order.tolist()}) == grid[0] * grid[1] == len(order)


def test_halton_ranks_are_rolled_by_the_seed_alone():
    ranks = ordered.halton_ranks((6, 5), [3, 4, 3], "grid")
    assert torch.equal(ranks[0], ranks[2]) and not torch.equal(ranks[0], ranks[1])
    still = ordered.halton_ranks((6, 5), [3, 4])
    assert torch.equal(still[0], still[1])
    order = ordered.halton_order(6, 5)
    assert torch.equal(still[0][order[:, 0], order[:, 1]], torch.arange(30))
    rolled = {
        tuple(still[0].roll((i, j), (0, 1)).flatten().tolist()) for i in range(6) for j in range(5)
    }
    assert tuple(ranks[1].flatten().tolist()) in rolled
    begun = ordered.halton_ranks((6, 5), [3, 4], "order")
    assert not torch.equal(begun[0], begun[1])
    for image in begun:  # the reference's: its list of cells, rolled
        cells = image.flatten().argsort()
        offset = int((image - still[0])[0, 0])
        expected = (order[:, 0] * 5 + order[:, 1]).roll(offset)
        assert torch.equal(cells, expected)


def test_halton_opens_in_its_order():
    states = [masks(2)]
    setting = config(order="halton", counting="halton", schedule="arccos", steps=7)
    decode(Network(), states[0], setting, on_step=lambda i, a, b: states.append(b))
    ranks = ordered.halton_ranks(GRID, seeds(2), "grid")
    for state in states:
        for image in range(2):
            known = ranks[image][state[image] != MASK]
            assert sorted(known.tolist()) == list(range(len(known)))


@pytest.mark.parametrize("order", ["random", "halton"])
def test_one_token_per_step_is_exact(order):
    """With the true conditionals as network, decoding draws from the true joint distribution."""
    places, codes, n = 3, 3, 20_000
    joint = torch.tensor(list(itertools.product(range(codes), repeat=places)))  # [27, 3]
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(len(joint), generator=generator, dtype=torch.float64) ** 3 + 0.002
    weight[joint.sum(1) == 3] *= 6  # tokens that depend on each other
    weight /= weight.sum()

    def predict(x: Tensor, scale: float, keep: Tensor) -> Tensor:
        rows = x.flatten(1)[:, None]  # [B, 1, places]
        fits = ((rows == joint) | (rows == codes)).all(-1) * weight  # [B, 27]
        one_hot = torch.nn.functional.one_hot(joint, codes).double()  # [27, places, codes]
        conditional = torch.einsum("bj,jpc->bpc", fits, one_hot)
        return conditional.log().view(*x.shape, codes)[keep]

    grid = (1, places)
    names = list(range(n))
    start = torch.full((n, *grid), codes)
    setting = DecodeConfig(steps=places, order=order)
    more = {"ranks": ordered.halton_ranks(grid, names, "grid")} if order == "halton" else {}
    tokens = process.decode(
        predict,
        lambda rows: rows,
        start=start,
        mask_id=codes,
        **process.loop_settings(setting, torch.full((n,), places)),
        **process.sample_noise(names, places, grid),
        **more,
    )
    power = codes ** torch.arange(places - 1, -1, -1)
    counts = (tokens.flatten(1) * power).sum(1).bincount(minlength=len(joint))
    assert chisquare(counts, weight * n).pvalue > 1e-3
    # the test can fail: all tokens at once forget how they depend on each other
    one = process.decode(
        predict,
        lambda rows: rows,
        start=start,
        mask_id=codes,
        **process.loop_settings(DecodeConfig(steps=1, order=order), torch.full((n,), places)),
        **process.sample_noise(names, 1, grid),
        **more,
    )
    counts = (one.flatten(1) * power).sum(1).bincount(minlength=len(joint))
    assert chisquare(counts, weight * n).pvalue < 1e-9


def test_the_critic_chooses_what_is_masked_again():
    """A critic that knows the picture lets only right tokens stay."""
    truth = torch.randint(K, (40, *GRID), generator=torch.Generator().manual_seed(2))
    setting = config(order="critic", frozen=False, choice_temperature=0.0, steps=9)

    def right(critic: Callable[[Tensor], Tensor]) -> float:
        network = Network()
        network.output.zero_()  # every token is a guess
        return float((decode(network, masks(40), setting, critic=critic) == truth).float().mean())

    assert right(lambda x: (x == truth).float()) > 0.6
    assert right(lambda x: torch.zeros(x.shape)) < 0.25  # chance is 1/6


def test_critic_loss_is_least_where_it_is_right():
    real = torch.tensor([[[True, False]]])
    good, bad = torch.tensor([[[3.0, -3.0]]]), torch.tensor([[[-3.0, 3.0]]])
    assert process.critic_loss(good, real) < 0.1 < 3 < process.critic_loss(bad, real)
    assert process.critic_loss(torch.zeros(1, 1, 2), real).item() == pytest.approx(math.log(2))


def test_presets_name_the_combinations():
    assert set(PRESETS) == {"paper", "maskgit", "amused", "open_muse", "halton"}
    paper, maskgit, halton = PRESETS["paper"], PRESETS["maskgit"], PRESETS["halton"]
    assert paper.frozen and paper.steps == 24 and paper.superres.steps == 8
    assert process.guidance_scales(paper)[0] == 1 < process.guidance_scales(paper)[-1]
    assert set(process.guidance_scales(maskgit)) == {1.0}
    assert process.choice_temperatures(PRESETS["amused"])[::11] == [2.0, 0.0]
    counts = process.loop_settings(halton, torch.tensor([256]))["counts"][:, 0]
    assert 256 - counts[0] == 5 and counts[-1] == 0
