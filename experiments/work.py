"""The work behind each stage; experiments.stages says what its result depends on."""

import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from torch import Tensor

from data.tokens import cache_settings, write_token_cache
from data.webdata import WebData, prepare
from eval.digits import score_digits
from eval.judge import load_judge
from eval.judge_network import Judge
from eval.latents import score_compression, score_smoothness
from eval.reconstruction import score_reconstructions
from eval.scene_clip import load_clip
from eval.scenes import score_scenes
from experiments.config import CODECS, RunSettings, StackedRun, resolved, to_yaml
from experiments.edit_stage import draw_edits, edit_cards, scores_of_edits
from experiments.pictures import grid, load_png, reduced, save_png, strip, to_uint8
from experiments.progress import Counter
from experiments.report import Card, Report, StageRow, Trace, write_report
from experiments.stages import (
    LPIPS_SCENES,
    Outcome,
    codec_file,
    codec_section,
    codec_trainer,
    lpips_file,
    plan,
    sections,
    upscales,
)
from experiments.store import Say, Store
from experiments.training import (
    CachedData,
    curves,
    device_of,
    end_with_parent,
    fit,
    wandb_logger,
)
from experiments.upscale import upscale
from lightning_modules.common.checkpoint import file_hash, load_weights, save_weights
from lightning_modules.common.perceptual import load_lpips
from lightning_modules.common.seeding import mix_seed
from lightning_modules.registry import (
    GENERATORS,
    TOKENIZERS,
    generator_file,
    load_generator,
    load_tokenizer,
)

CHECKPOINT = "checkpoint.safetensors"
MEASURED = 10_000  # pictures behind the statistics of latents, as in LDMAE's released code
SHOWN_STEPS = 12  # of a trace, at most


class Work:
    """One run: its settings, its store, and a method per stage.

    Args:
        paper: a key of RUNS.
        scale: name of the scale, for titles.
        config: the checked settings.
        out: the run folder.
        command: what was typed.
        say: gets one line per event.
    """

    def __init__(
        self, paper: str, scale: str, config: RunSettings, out: Path, command: str, say: Say
    ) -> None:
        self.paper, self.scale, self.config, self.out = paper, scale, config, out
        self.codec_name = f"{config.CODEC}.safetensors"
        self.command, self.say = command, say
        self.stages = {stage.name: stage for stage in plan(paper, config)}
        self.store = Store(config.cache, list(self.stages))
        self.device = device_of(config.trainer)
        self.splits: dict[str, list[str]] = {}
        logger = wandb_logger(config, paper, scale, out)
        self.loggers = [] if logger is None else [logger]
        self.notes: list[str] = []
        self.noted = 0.0
        self.reused: set[str] = set()

    def everything(self) -> Outcome:
        """Do all stages in order and publish their results in the run folder."""
        if self.store.leader:
            return self._everything()
        end_with_parent()
        try:
            return self._everything()
        except Exception:
            time.sleep(3)  # where the leader was interrupted, this process ends here, quietly
            raise

    def _everything(self) -> Outcome:
        self.data()
        codec = self.codec() / self.codec_name
        generator = None
        if isinstance(self.config, StackedRun):
            cache = self.cache(codec) if self.config.data.cache else None
            generator = self.train(self.config, codec, cache)
            if upscales(self.config):
                generator = upscale(self, self.config, generator, codec)
        if not self.store.leader:
            return Outcome()
        samples = self.sample(generator) if generator else None
        edits = None
        if generator and "edits" in self.stages:
            edits = draw_edits(self, generator / CHECKPOINT)
        scores = self.score(codec, samples, edits)
        return self.report(codec, generator, samples, scores, edits)

    def _stage(self, name: str, work: Any, everyone: bool = False) -> Path:
        stage = self.stages[name]
        if self.store.done(stage) is not None:
            self.reused.add(name)
        return self.store.run(name, stage.key, resolved(self.config), work, self.say, everyone)

    def data(self) -> None:
        """Draw the embedded data, or find the user's shards."""

        def work(folder: Path) -> dict[str, Any]:
            splits = prepare(self.config.data, folder, self._note)
            return {split: len(paths) for split, paths in splits.items()}

        self.splits = prepare(self.config.data, self._stage("data", work))

    def _note(self, text: str) -> None:
        """Say what a stage does, but not more often than somebody reads."""
        now = time.monotonic()
        if now - self.noted >= 5:
            self.noted = now
            self.say(f"      {text}")

    def web(self, batch_size: int, epoch_batches: int) -> WebData:
        """Make the DataModule over pictures."""
        return WebData(
            self.config.data, self.splits, batch_size=batch_size, seed=self.config.seed,
            epoch_batches=epoch_batches,
        )  # fmt: skip

    def codec(self) -> Path:
        """Take the tokenizer or autoencoder that is named, or train it."""
        name, section = self.config.CODEC, codec_section(self.config)
        paper, settings, _ = CODECS[name]
        given = codec_file(self.config)

        def take(folder: Path) -> dict[str, Any]:
            assert given is not None
            module = load_tokenizer(given, self.device, paper)  # speaks up where it is none
            if name == "autoencoder":
                self._measure(module)
                save_weights(folder / self.codec_name, *module.export())
            else:
                _copy(given, folder / self.codec_name)
            return {"from": str(given)}

        def train(folder: Path) -> dict[str, Any]:
            trainer = codec_trainer(self.config, section)
            seed_everything(self.config.seed, verbose=False)
            plain = resolved(section)
            own = {f.name: plain[f.name] for f in dataclasses.fields(settings)}
            lpips = lpips_file(self.config)
            own["objective"]["lpips_path"] = None if lpips is None else str(lpips)
            module = TOKENIZERS[paper]({"seed": self.config.seed, **own})
            finetune = getattr(section, "finetune", None)
            if finetune is not None:
                state, given_by = load_weights(finetune)
                if given_by.get("paper") != "vqgan":
                    raise ValueError(f"finetune: {finetune} is no tokenizer file")
                tokenizer: Any = module
                tokenizer.adopt(state, given_by.get("tokens_of") or file_hash(finetune))
            data = self.web(trainer.batch_size, trainer.epochs[1])
            fit(
                module, data, trainer, folder, what=name, say=self.say,
                loggers=self.loggers if self.paper == paper else (), two_players=True,
            )  # fmt: skip
            if self.store.leader:
                if name == "autoencoder":
                    self._measure(module.to(self.device).eval())
                save_weights(folder / self.codec_name, *module.export())
            return {"parameters": _count(module), "skipped": data.skipped}

        objective: Any = section.objective  # type: ignore[attr-defined]
        if given is None and objective.perceptual_weight and not objective.lpips_path:
            note = "perceptual term off: objective.lpips_path names no LPIPS weights"
            self.notes.append(note)
            self.say(f"      {note}")
        return self._stage(name, take if given else train, everyone=given is None)

    def _measure(self, autoencoder: Any) -> None:
        """Set the statistics of an autoencoder's latents to those of this run's pictures."""
        data, size = self.config.data, self.config.eval.batch_size
        count = MEASURED if data.name == "shards" else min(MEASURED, data.train_size)
        self._note(f"statistics of the latents of {count} training pictures")
        # in one process and order, whatever the machine
        data = dataclasses.replace(data, flip=False, workers=0, shuffle_buffer=1000)
        web = WebData(
            data, self.splits, batch_size=size, seed=self.config.seed,
            epoch_batches=-(-count // size),
        )  # fmt: skip
        chance = torch.Generator().manual_seed(mix_seed(self.config.seed, 0))
        autoencoder.measure((batch["image"] for batch in web.stream()), chance)

    def cache(self, codec: Path) -> Path:
        """Encode the training shards once, to tokens or to moments."""

        def work(folder: Path) -> dict[str, Any]:
            module = load_tokenizer(codec, self.device)
            num_codes = getattr(module, "num_codes", None)
            return write_token_cache(
                module.encode if num_codes else module.moments, self.config.data, self.splits,
                folder, sha256=file_hash(codec), num_codes=num_codes,
                batch_size=self.config.eval.batch_size, device=self.device, progress=self._note,
            )  # fmt: skip

        return self._stage("cache", work)

    def train(self, config: StackedRun, codec: Path, cache: Path | None) -> Path:
        """Train the generator on the cache, or on pictures that are encoded in every step."""

        def work(folder: Path) -> dict[str, Any]:
            frozen = load_tokenizer(codec)
            num_codes = getattr(frozen, "num_codes", None)
            side = config.data.resolution // frozen.factor
            seed_everything(config.seed, verbose=False)
            module = GENERATORS[self.paper](
                {
                    "paper": self.paper,
                    "seed": config.seed,
                    "grid": [side, side],
                    "num_codes": num_codes,
                    **sections(config),
                    "sampling": resolved(config)["sampling"],
                }
            ).attach(frozen)
            length = config.trainer.epochs[1]
            data: Any = self.web(config.trainer.batch_size, length)
            if cache is not None:
                data = CachedData(
                    cache, data, batch_size=config.trainer.batch_size, seed=config.seed,
                    epoch_batches=length,
                    expect=cache_settings(config.data, file_hash(codec), num_codes),
                )  # fmt: skip
            if module.begin(file_hash(codec)):
                fit(
                    module, data, config.trainer, folder, what="train", say=self.say,
                    loggers=self.loggers,
                )  # fmt: skip
            if self.store.leader:
                _copy(codec, folder / self.codec_name)
                save_weights(folder / CHECKPOINT, *generator_file(module, codec, self.codec_name))
            skipped = {} if cache is not None else {"skipped": data.skipped}
            return {"parameters": _count(module), **skipped}

        return self._stage("train", work, everyone=True)

    def sample(self, generator: Path) -> Path:
        """Draw a picture for every prompt that is scored, and a few of them step by step."""
        e = self.config.eval

        def work(folder: Path) -> dict[str, Any]:
            module = load_generator(generator / CHECKPOINT, device=self.device)
            sampling = resolved(self.config)["sampling"]
            prompts = list(self._prompts())
            counter = Counter("sample", len(prompts), self.say, self.config.trainer.progress)
            missing = [p for p in prompts if not (folder / p["file"]).exists()]
            for first in range(0, len(missing), e.batch_size):
                part = missing[first : first + e.batch_size]
                made = module.pictures(
                    [p["prompt"] for p in part], seeds=[p["seed"] for p in part],
                    **_labels(module, part), **sampling,
                )  # fmt: skip
                for stage, images in made.items():
                    # the final pictures come last, and have the plain names
                    end = "" if stage == list(made)[-1] else f"{stage}-"
                    for p, image in zip(part, to_uint8(images.cpu()), strict=True):
                        text = {"prompt": p["prompt"], "seed": str(p["seed"])}
                        save_png(folder / f"{end}{p['file']}", image, text)
                counter.update(len(prompts) - len(missing) + first + len(part))
            counter.close()
            traces = [self._trace(module, p, sampling, folder) for p in prompts[: e.traces]]
            _write_json(folder / "prompts.json", prompts)
            _write_json(folder / "traces.json", traces)
            return {"pictures": len(prompts)}

        return self._stage("sample", work)

    def _prompts(self) -> Iterator[dict[str, Any]]:
        """Yield what is asked: prompt, seed and file name, with the attributes where known."""
        e = self.config.eval
        web = self.web(e.batch_size, 1)
        number = 0
        for split, count in (("val", e.prompts), ("heldout", e.heldout)):
            if split not in self.splits or count == 0:
                continue
            for sample in web.samples(split, count):
                known: dict[str, Any] = {
                    k: sample[k] for k in ("attributes", "label") if k in sample
                }
                yield {
                    "split": split, "key": sample["key"], "prompt": sample["caption"],
                    "seed": e.seed + number, "file": f"{number:05d}.png", **known,
                }  # fmt: skip
                number += 1

    def _trace(
        self, module: Any, asked: dict[str, Any], sampling: dict[str, Any], folder: Path
    ) -> dict[str, Any]:
        """Draw one picture again and show what its tokens or latents were after every step."""
        steps: list[Tensor] = []
        inputs: list[Tensor] = []

        def on_step(i: int, before: Tensor, after: Tensor) -> None:
            inputs.append(before)
            steps.append(after)

        module.sample(
            [asked["prompt"]], seeds=[asked["seed"]], on_step=on_step, **_labels(module, [asked]),
            **sampling,
        )  # fmt: skip
        states = torch.cat([inputs[0], *steps])  # [T + 1, h, w], or [T + 1, C, h, w]
        changed = states[1:] != states[:-1] if states.ndim == 3 else None
        count = len(steps)
        shown = torch.linspace(1, count, min(count, SHOWN_STEPS)).round().long()  # few of many
        pictures = to_uint8(self._decoded(module.tokenizer, states[shown]).cpu())
        name = f"trace-{asked['file']}"
        masks = None if changed is None else changed[shown - 1].cpu()
        save_png(folder / name, strip(pictures, masks, numbers=shown.tolist()))
        return {
            "prompt": asked["prompt"], "file": name, "steps": count,
            "changed": [] if changed is None else changed.flatten(1).sum(1).tolist(),
            "tokens": 0 if changed is None else states[0].numel(),
        }  # fmt: skip

    def _decoded(self, codec: Any, states: Tensor) -> Tensor:
        """Decode unfinished tokens [T, h, w] or latents [T, C, h, w]; masked tokens are grey."""
        if states.ndim == 4:
            return codec.decode(states)
        masked = states >= codec.num_codes
        pictures = codec.decode(states.clamp(max=codec.num_codes - 1))
        if not masked.any():
            return pictures
        hidden = masked.repeat_interleave(codec.factor, 1).repeat_interleave(codec.factor, 2)
        return pictures.masked_fill(hidden[:, None], 0.0)

    def score(self, codec: Path, samples: Path | None, edits: Path | None = None) -> Path:
        """Score the codec's reconstructions, an autoencoder's latents, and the samples."""
        e, data = self.config.eval, self.config.data

        def work(folder: Path) -> dict[str, Any]:
            module = load_tokenizer(codec, self.device)
            real = self.web(e.batch_size, 1).samples("val", max(e.prompts, 4))
            batches = torch.stack([s["image"] for s in real]).split(e.batch_size)
            encoded = [module.encode(b.to(self.device)) for b in batches]
            made = torch.cat([module.decode(x).cpu() for x in encoded])
            prefix = "eval" if samples is None else self.config.CODEC
            chance: dict[str, Any] = {"resamples": e.bootstrap, "seed": e.seed}
            weights = lpips_file(self.config)
            scores = score_reconstructions(
                module, batches, device=self.device, prefix=prefix, **chance,
                lpips=None if weights is None else load_lpips(weights).to(self.device),
                lpips_name="lpips_scenes" if weights == LPIPS_SCENES else "lpips",
            )  # fmt: skip
            pairs = torch.stack([torch.cat(batches), made], dim=1)[
                : max(1, e.grid // 2)
            ]  # [n, 2, ...]
            sheet = grid(to_uint8(pairs.flatten(0, 1)), columns=8)
            save_png(folder / "reconstructions.png", sheet)
            verdicts: list[dict[str, Any]] = []
            if data.name == "scenes":
                reconstructed = self._scene_scores(
                    to_uint8(made), real, [s["caption"] for s in real], real, prefix
                )[0]
                # captions say nothing of a tokenizer; and its pictures are those of the reference,
                # so their Frechet distance would not stand beside that of samples
                scores |= {k: v for k, v in reconstructed.items() if "scene_accuracy" in k}
            if samples is not None:
                scores, verdicts = self._score_samples(samples, real, scores)
            elif self.config.CODEC == "autoencoder":
                scores |= self._score_latents(module, torch.cat(encoded), real)
            if edits is not None:
                found, read = scores_of_edits(self, edits)
                scores |= found
                _write_json(folder / "edits.json", read)
            _write_json(folder / "metrics.json", scores)
            _write_json(folder / "verdicts.json", verdicts)
            return {name: s["value"] for name, s in scores.items()}

        return self._stage("score", work)

    def _score_latents(
        self, module: Any, latents: Tensor, real: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Score an autoencoder's normalised latents [N, C, h, w]: smoothness and compression."""
        data, e = self.config.data, self.config.eval
        known = data.name == "scenes"
        chance: dict[str, Any] = {"resamples": e.bootstrap, "seed": e.seed}
        scores = score_smoothness(
            module.decode, latents, torch.ones(latents.shape[1]),
            torch.stack([s["image"] for s in real]), batch_size=e.batch_size, **chance,
            judge=self._judge() if known else None,
        )  # fmt: skip
        if known:
            shown = [s["attributes"] for s in real]
            scores |= score_compression(latents, shown, data.resolution, **chance)
        return scores

    def _judge(self) -> Judge:
        """Return the judge of this run's scenes, trained on first use where none ships."""
        data = self.config.data
        return load_judge(data.resolution, data.max_objects, Path(self.config.cache) / "judges")

    def _score_samples(
        self, samples: Path, real: list[dict[str, Any]], others: dict[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Score generated pictures by what the data knows of them; `others` come last."""
        prompts = json.loads((samples / "prompts.json").read_text())
        scores: dict[str, Any] = {}
        verdicts: list[dict[str, Any]] = []
        assert isinstance(self.config, StackedRun)
        for start, prefix in self.config.scored.items():
            images = torch.stack([load_png(samples / f"{start}{p['file']}")[0] for p in prompts])
            found, read = self._score_pictures(prompts, images, real, prefix)
            scores |= found
            if not start:  # the page shows the final pictures
                verdicts = read
        return {**scores, **others}, verdicts

    def _score_pictures(
        self,
        prompts: list[dict[str, Any]],
        images: Tensor,
        real: list[dict[str, Any]],
        prefix: str,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Score pictures [N, 3, H, W] uint8, reduced to the data's resolution if larger."""
        e, size, resolution = self.config.eval, images.shape[-1], self.config.data.resolution
        if size > resolution:
            images = reduced(images, resolution)
        scores: dict[str, Any] = {}
        verdicts: list[dict[str, Any]] = [{} for _ in prompts]
        if self.config.data.name == "digits":
            labels = [p["label"] for p in prompts]
            scores, verdicts = score_digits(images, labels, resamples=e.bootstrap, seed=e.seed)
            scores = {f"{prefix}/{k.removeprefix('eval/')}": v for k, v in scores.items()}
        elif self.config.data.name == "scenes":
            for split in ("val", "heldout"):
                chosen = [i for i, p in enumerate(prompts) if p["split"] == split]
                if len(chosen) < 2:
                    continue
                asked = [prompts[i] for i in chosen]
                truth = real
                if split != "val":
                    truth = self.web(e.batch_size, 1).samples(split, max(len(asked), 4))
                found, read = self._scene_scores(
                    images[chosen], asked, [p["prompt"] for p in asked], truth,
                    prefix if split == "val" else f"{prefix}/{split}",
                )  # fmt: skip
                scores |= found
                for i, verdict in zip(chosen, read, strict=True):
                    verdicts[i] = verdict
        if size > resolution:
            how = f"{size} px, reduced to {resolution} px by area averaging"
            scores = {name: {**score, "pictures": how} for name, score in scores.items()}
        return scores, verdicts

    def _scene_scores(
        self,
        images: Tensor,
        asked: list[dict[str, Any]],
        captions: list[str],
        real: list[dict[str, Any]],
        prefix: str,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        data, e = self.config.data, self.config.eval
        clip = load_clip(data.resolution, data.max_objects, Path(self.config.cache) / "judges")
        return score_scenes(
            images, [a["attributes"] for a in asked], captions, judge=self._judge(), clip=clip,
            real_images=to_uint8(torch.stack([s["image"] for s in real])),
            real_captions=[s["caption"] for s in real], prefix=prefix, resamples=e.bootstrap,
            seed=e.seed,
        )  # fmt: skip

    def report(
        self,
        codec: Path,
        generator: Path | None,
        samples: Path | None,
        scored: Path,
        edits: Path | None = None,
    ) -> Outcome:
        """Write the page and put everything a person wants into the run folder."""
        scores = json.loads((scored / "metrics.json").read_text())

        def work(folder: Path) -> dict[str, Any]:
            page = self._page(generator or codec.parent, samples, scored, scores)
            if edits is not None:
                read = json.loads((scored / "edits.json").read_text())
                page.cards += edit_cards(edits, read, self.config.eval.grid // 2)
            write_report(folder / "report.html", page)
            if samples is not None:
                self._overview(samples, folder / "samples.png")
            else:
                _copy(scored / "reconstructions.png", folder / "samples.png")
            _copy(scored / "metrics.json", folder / "metrics.json")
            return {"title": page.title}

        folder = self._stage("report", work)
        self.out.mkdir(parents=True, exist_ok=True)
        files = {name: self.out / name for name in ("metrics.json", "samples.png", "report.html")}
        for name, path in files.items():
            _copy(folder / name, path)
        if generator is not None:
            # whichever run trained it, the checkpoint samples as this one did
            state, trained = load_weights(generator / CHECKPOINT)
            sampling = resolved(self.config)["sampling"]
            save_weights(self.out / CHECKPOINT, state, {**trained, "sampling": sampling})
            for path in generator.glob("*.safetensors"):  # further tokenizers that it needs
                if path.name not in (CHECKPOINT, self.codec_name):
                    _copy(path, self.out / path.name)
        _copy(codec, self.out / self.codec_name)
        name = CHECKPOINT if generator is not None else self.codec_name
        files["checkpoint"] = self.out / name
        (self.out / "config.yaml").write_text(to_yaml(self.config))
        for logger in self.loggers:
            logger.log_metrics({k: s["value"] for k, s in scores.items()})
            logger.log_image("samples/grid", [str(files["samples.png"])])
            logger.experiment.finish()
        return Outcome(scores, files)

    def _page(
        self, trained: Path, samples: Path | None, scored: Path, scores: dict[str, Any]
    ) -> Report:
        """Collect what the page shows."""
        page = Report(
            title=f"{self.paper} on {self.config.data.name}, scale {self.scale}",
            paper=self.paper,
            scale=self.scale,
            command=self.command,
            machine=_machine(self.device),
            scores=scores,
            notes=self.notes,
            curves=self._losses(trained),
            reconstructions=scored / "reconstructions.png",
            config_yaml=to_yaml(self.config),
            stages=[
                StageRow(s.name, s.key, done["seconds"], s.name in self.reused)
                for s in self.stages.values()
                if (done := self.store.done(s)) is not None
            ],
            skipped={
                s.name: done["what"]["skipped"]
                for s in self.stages.values()
                if (done := self.store.done(s)) is not None and "skipped" in done["what"]
            },
        )
        if samples is not None:
            prompts = json.loads((samples / "prompts.json").read_text())
            verdicts = json.loads((scored / "verdicts.json").read_text())
            page.cards = [
                Card(
                    samples / p["file"], p["prompt"], p["split"], p["seed"], v.get("right"),
                    f"wrong: {', '.join(v['wrong'])}; read: {v['text']}" if v.get("wrong") else "",
                )
                for p, v in self._shown(prompts, verdicts)
            ]  # fmt: skip
            traces = json.loads((samples / "traces.json").read_text())
            page.traces = [
                Trace(t["prompt"], samples / t["file"], t["changed"], t["tokens"]) for t in traces
            ]
        return page

    def _losses(self, trained: Path) -> dict[str, list[tuple[int, float]]]:
        """Return the loss curves of the generator, or of the codec where that is all."""
        folders = {"": trained}
        if upscales(self.config):  # each stage was trained in a folder of its own
            names = {"": "train", "superres ": "superres"}
            folders = {start: self.store.folder(self.stages[n]) for start, n in names.items()}
        return {
            f"{start}{name}": points
            for start, folder in folders.items()
            for name, points in curves(folder).items()
            if name.endswith("/loss")
        }

    def _shown(
        self, prompts: list[dict[str, Any]], verdicts: list[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The first prompts of every split, eval.grid in all."""
        pairs = list(zip(prompts, verdicts, strict=True))
        splits = sorted({p["split"] for p in prompts}, reverse=True)
        each = -(-self.config.eval.grid // len(splits))
        return [pair for s in splits for pair in [x for x in pairs if x[0]["split"] == s][:each]]

    def _overview(self, samples: Path, path: Path) -> None:
        """Lay the first pictures out with their prompts."""
        prompts = json.loads((samples / "prompts.json").read_text())[: self.config.eval.grid]
        images = torch.stack([load_png(samples / p["file"])[0] for p in prompts])
        captions = [p["prompt"] for p in prompts]
        save_png(path, grid(images, columns=8, captions=captions), {"command": self.command})


def _labels(module: Any, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the labels that are asked for, for a generator that is conditioned on labels."""
    config = module.config
    if (getattr(config, "condition", None) or getattr(config.model, "condition", "text")) not in (
        "class", "label",
    ):  # fmt: skip
        return {}
    return {"labels": [p["label"] for p in asked]}


def _copy(source: Path, target: Path) -> None:
    """Copy a file; the copy appears whole or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _write_json(path: Path, content: Any) -> None:
    """Write JSON; the file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _machine(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"
