"""The work behind each stage; experiments.stages says what its result depends on."""

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
from eval.reconstruction import score_reconstructions
from eval.scene_clip import load_clip
from eval.scenes import score_scenes
from experiments.config import GeneratorRun, RunSettings, resolved, to_yaml
from experiments.pictures import grid, load_png, save_png, strip, to_uint8
from experiments.progress import Counter
from experiments.report import Card, Report, StageRow, Trace, write_report
from experiments.stages import (
    Outcome,
    plan,
    sections,
    tokenizer_file,
    tokenizer_section,
    tokenizer_trainer,
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
from lightning_modules.common.checkpoint import file_hash, load_weights, save_weights
from lightning_modules.registry import GENERATORS, generator_file, load_generator, load_tokenizer
from lightning_modules.vqgan.module import VQGANModule

CHECKPOINT, TOKENIZER = "checkpoint.safetensors", "tokenizer.safetensors"


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
        tokenizer = self.tokenizer() / TOKENIZER
        generator = None
        if isinstance(self.config, GeneratorRun):
            cache = self.cache(tokenizer) if self.config.data.cache else None
            generator = self.train(self.config, tokenizer, cache)
        if not self.store.leader:
            return Outcome()
        samples = self.sample(generator) if generator else None
        scores = self.score(tokenizer, samples)
        return self.report(tokenizer, generator, samples, scores)

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

    def tokenizer(self) -> Path:
        """Take the tokenizer that is named, or train it."""
        section = tokenizer_section(self.config)
        given = tokenizer_file(section)

        def take(folder: Path) -> dict[str, Any]:
            assert given is not None
            load_tokenizer(given)  # speaks up where the file is no tokenizer
            _copy(given, folder / TOKENIZER)
            return {"from": str(given)}

        def train(folder: Path) -> dict[str, Any]:
            trainer = tokenizer_trainer(self.config, section)
            seed_everything(self.config.seed, verbose=False)
            plain = resolved(section)
            names = ("model", "objective", "optim")
            module = VQGANModule({"seed": self.config.seed, **{n: plain[n] for n in names}})
            data = self.web(trainer.batch_size, trainer.epochs[1])
            fit(
                module, data, trainer, folder, what="tokenizer", say=self.say,
                loggers=self.loggers if self.paper == "vqgan" else (), two_players=True,
            )  # fmt: skip
            if self.store.leader:
                save_weights(folder / TOKENIZER, *module.export())
            return {"parameters": _count(module), "skipped": data.skipped}

        if given is None and section.objective.perceptual_weight and not (
            section.objective.lpips_path
        ):  # fmt: skip
            note = "perceptual term off: objective.lpips_path names no LPIPS weights"
            self.notes.append(note)
            self.say(f"      {note}")
        return self._stage("tokenizer", take if given else train, everyone=given is None)

    def cache(self, tokenizer: Path) -> Path:
        """Encode the training shards to tokens once."""

        def work(folder: Path) -> dict[str, Any]:
            module = load_tokenizer(tokenizer, self.device)
            return write_token_cache(
                module.encode, self.config.data, self.splits, folder,
                sha256=file_hash(tokenizer), num_codes=module.num_codes,
                batch_size=self.config.eval.batch_size, device=self.device, progress=self._note,
            )  # fmt: skip

        return self._stage("cache", work)

    def train(self, config: GeneratorRun, tokenizer: Path, cache: Path | None) -> Path:
        """Train the generator on cached tokens, or on pictures that are encoded in every step."""

        def work(folder: Path) -> dict[str, Any]:
            frozen = load_tokenizer(tokenizer)
            side = config.data.resolution // frozen.factor
            seed_everything(config.seed, verbose=False)
            module = GENERATORS[self.paper](
                {
                    "paper": self.paper,
                    "seed": config.seed,
                    "grid": [side, side],
                    "num_codes": frozen.num_codes,
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
                    expect=cache_settings(config.data, file_hash(tokenizer), frozen.num_codes),
                )  # fmt: skip
            fit(
                module, data, config.trainer, folder, what="train", say=self.say,
                loggers=self.loggers,
            )  # fmt: skip
            if self.store.leader:
                _copy(tokenizer, folder / TOKENIZER)
                save_weights(folder / CHECKPOINT, *generator_file(module, tokenizer, TOKENIZER))
            return {"parameters": _count(module)}

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
                images = module.sample(
                    [p["prompt"] for p in part], seeds=[p["seed"] for p in part], **sampling
                )
                for p, image in zip(part, to_uint8(images.cpu()), strict=True):
                    text = {"prompt": p["prompt"], "seed": str(p["seed"])}
                    save_png(folder / p["file"], image, text)
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
        """Draw one picture again and keep what its tokens were after every step."""
        steps: list[Tensor] = []
        inputs: list[Tensor] = []

        def on_step(i: int, before: Tensor, after: Tensor) -> None:
            inputs.append(before)
            steps.append(after)

        module.sample([asked["prompt"]], seeds=[asked["seed"]], on_step=on_step, **sampling)
        states = torch.cat([inputs[0], *steps])  # [T + 1, h, w]
        changed = states[1:] != states[:-1]
        pictures = to_uint8(module.tokenizer.decode(states).cpu())
        name = f"trace-{asked['file']}"
        save_png(folder / name, strip(pictures[1:], changed.cpu()))
        return {
            "prompt": asked["prompt"], "file": name,
            "changed": changed.flatten(1).sum(1).tolist(), "tokens": states[0].numel(),
        }  # fmt: skip

    def score(self, tokenizer: Path, samples: Path | None) -> Path:
        """Score the tokenizer's reconstructions and the samples."""
        e, data = self.config.eval, self.config.data

        def work(folder: Path) -> dict[str, Any]:
            module = load_tokenizer(tokenizer, self.device)
            real = self.web(e.batch_size, 1).samples("val", max(e.prompts, 4))
            batches = torch.stack([s["image"] for s in real]).split(e.batch_size)
            made = torch.cat(
                [module.decode(module.encode(b.to(self.device))).cpu() for b in batches]
            )
            prefix = "eval" if samples is None else "tokenizer"
            chance: dict[str, Any] = {"resamples": e.bootstrap, "seed": e.seed}
            scores = score_reconstructions(
                module, batches, device=self.device, prefix=prefix, **chance
            )
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
            _write_json(folder / "metrics.json", scores)
            _write_json(folder / "verdicts.json", verdicts)
            return {name: s["value"] for name, s in scores.items()}

        return self._stage("score", work)

    def _score_samples(
        self, samples: Path, real: list[dict[str, Any]], others: dict[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Score generated pictures by what the data knows of them; `others` come last."""
        prompts = json.loads((samples / "prompts.json").read_text())
        images = torch.stack([load_png(samples / p["file"])[0] for p in prompts])
        e = self.config.eval
        scores: dict[str, Any] = {}
        verdicts: list[dict[str, Any]] = [{} for _ in prompts]
        if self.config.data.name == "digits":
            labels = [p["label"] for p in prompts]
            scores, verdicts = score_digits(images, labels, resamples=e.bootstrap, seed=e.seed)
        elif self.config.data.name == "scenes":
            for split in ("val", "heldout"):
                chosen = [i for i, p in enumerate(prompts) if p["split"] == split]
                if len(chosen) < 2:
                    continue
                asked = [prompts[i] for i in chosen]
                truth = real
                if split != "val":
                    truth = self.web(e.batch_size, 1).samples(split, max(len(asked), 4))
                prefix = "eval" if split == "val" else f"eval/{split}"
                found, read = self._scene_scores(
                    images[chosen], asked, [p["prompt"] for p in asked], truth, prefix
                )
                scores |= found
                for i, verdict in zip(chosen, read, strict=True):
                    verdicts[i] = verdict
        return {**scores, **others}, verdicts

    def _scene_scores(
        self,
        images: Tensor,
        asked: list[dict[str, Any]],
        captions: list[str],
        real: list[dict[str, Any]],
        prefix: str,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        data, e = self.config.data, self.config.eval
        judges = Path(self.config.cache) / "judges"
        judge = load_judge(data.resolution, data.max_objects, judges)
        clip = load_clip(data.resolution, data.max_objects, judges)
        return score_scenes(
            images, [a["attributes"] for a in asked], captions, judge=judge, clip=clip,
            real_images=to_uint8(torch.stack([s["image"] for s in real])),
            real_captions=[s["caption"] for s in real], prefix=prefix, resamples=e.bootstrap,
            seed=e.seed,
        )  # fmt: skip

    def report(
        self, tokenizer: Path, generator: Path | None, samples: Path | None, scored: Path
    ) -> Outcome:
        """Write the page and put everything a person wants into the run folder."""
        scores = json.loads((scored / "metrics.json").read_text())

        def work(folder: Path) -> dict[str, Any]:
            page = self._page(generator or tokenizer.parent, samples, scored, scores)
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
        _copy(tokenizer, self.out / TOKENIZER)
        name = CHECKPOINT if generator is not None else TOKENIZER
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
            curves={k: v for k, v in curves(trained).items() if k.endswith("/loss")},
            reconstructions=scored / "reconstructions.png",
            config_yaml=to_yaml(self.config),
            stages=[
                StageRow(s.name, s.key, done["seconds"], s.name in self.reused)
                for s in self.stages.values()
                if (done := self.store.done(s)) is not None
            ],
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
