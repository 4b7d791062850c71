"""Sections of settings that every paper's run has: how long it trains, what it scores, on what."""

from dataclasses import dataclass, field
from typing import Literal

from experiments.pipeline.loop import Loop, Monitor
from lightning_modules.common.checks import at_least, require, within

MAX_SEED = 2**32 - 1  # of torch's generators, which take no more bits
APART = 1_000_000  # between the seeds of two splits, so that no two pictures share one


@dataclass
class TrainerConfig:
    """How long and on what machine a module is trained."""

    max_steps: int = 1000
    """Training batches that each device sees; with accumulate=k there are k batches per update."""
    epoch_steps: int = 250
    """Batches per virtual epoch (at most: epochs are equal); checkpoints stand at its borders."""
    batch_size: int = 64
    """Samples per batch and device."""
    accumulate: int = 1
    """Batches whose gradients are summed before one update."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic; auto is bf16-mixed on CUDA and 32-true elsewhere."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: int = 1
    """Devices per node."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"] = "auto"
    """How devices work together; auto is ddp where there are several; fsdp spreads the weights of a
    generator, its gradients, optimizer and average over them."""
    checkpoint_activations: bool = False
    """Compute the blocks again in the backward pass instead of keeping their activations."""
    compile: bool = False
    """Run the blocks of the network through torch.compile in training."""
    keep_every: int = 0
    """Virtual epochs between two weights that are kept beside resume.ckpt, as
    weights-STEP.safetensors for experiments.average; 0 keeps none."""
    val_batches: int = 4
    """Batches of the validation loss after every virtual epoch; 0 for none."""
    log_every: int = 20
    """Batches between two logged points."""
    progress: Literal["auto", "rich", "plain", "none"] = "auto"
    """Progress display; auto is rich on a terminal and plain lines elsewhere."""

    def __post_init__(self) -> None:
        names = ("max_steps", "epoch_steps", "batch_size", "accumulate", "devices", "num_nodes")
        at_least(self, 1, *names, "log_every")
        at_least(self, 0, "keep_every", "val_batches")
        require(
            self.strategy != "fsdp" or self.precision != "16-mixed",
            "precision must not be 16-mixed with strategy=fsdp; take bf16-mixed or 32-true",
        )

    @property
    def epochs(self) -> tuple[int, int]:
        """Number and length of the virtual epochs; their product is exactly max_steps.

        The length is the largest that divides max_steps and does not exceed epoch_steps; where
        that is less than half of epoch_steps, the whole training is one epoch.
        """
        for length in range(min(self.epoch_steps, self.max_steps), self.epoch_steps // 2, -1):
            if self.max_steps % length == 0:
                return self.max_steps // length, length
        return 1, self.max_steps

    def loop(self, world: int) -> Loop:
        """Return what of this changes the result, for trainings on `world` devices."""
        return Loop(*self.epochs, self.batch_size, self.accumulate, self.precision, world)

    def monitor(self) -> Monitor:
        """Return what is watched."""
        return Monitor(self.val_batches, self.log_every, self.keep_every)

    def check_adversarial(self, section: str) -> None:
        """Refuse what a training with a discriminator cannot do.

        Raises:
            ValueError: in manual optimization Lightning does not accumulate, and would clip scaled
                gradients.
        """
        if self.accumulate != 1:
            raise ValueError(
                f"{section}.accumulate must be 1 for a first stage, got {self.accumulate}"
            )
        if self.precision == "16-mixed":
            raise ValueError(
                f"{section}.precision must not be 16-mixed for a first stage; take bf16-mixed or "
                "32-true"
            )


@dataclass
class EvalConfig:
    """What is sampled and scored."""

    prompts: int = 512
    """Prompts (or images, for a first stage) of the val split that are scored."""
    heldout: int = 256
    """Prompts with attribute combinations that training never shows; 0 where there are none."""
    partial: int = 256
    """Prompts that leave something out, each asked 4 times; 0 where there are none."""
    batch_size: int = 64
    """Pictures that are encoded, made or scored at once; across sizes they agree up to rounding."""
    seed: int = 0
    """Seed of the pictures: prompt i is drawn with seed + i, of the heldout with 1000000 and of the
    partial ones with 2000000 more."""
    bootstrap: int = 1000
    """Resamples behind each score's 95 % interval."""
    grid: int = 64
    """Pictures in samples.png."""
    traces: int = 4
    """Prompts whose tokens are shown step by step in the report."""
    edits: int = 0
    """Scenes of which one half is generated anew for a changed caption, and scored; 0 for none."""
    scores: list[str] = field(default_factory=list)
    """Further scores of the val prompts' pictures, such as fid,kid,clip_score; python -m eval.fid
    --help lists them."""
    features: list[str] = field(default_factory=list)
    """Features of the further scores; empty takes the usual ones of each, scenes the embedded
    classifier."""
    weights: list[str] = field(default_factory=list)
    """NAME=FILE: weights of further features and scores, where they are in no usual cache."""

    def __post_init__(self) -> None:
        at_least(self, 2, "prompts")
        at_least(self, 1, "batch_size", "bootstrap", "grid")
        at_least(self, 0, "heldout", "partial", "traces", "edits")
        within(self, 0, MAX_SEED - 3 * APART, "seed")
        for name in ("features", "weights"):
            if getattr(self, name) and not self.scores:
                raise ValueError(f"{name} must be empty without scores, which they are for")


@dataclass
class FirstStageSection:
    """What stands under a generator: a finished first stage, or the settings that train one."""

    preset: str = "tiny"
    """File of the first stage's own configs that fills the settings of its training."""
    ckpt: str | None = "shipped"
    """shipped (the one that comes with the project), a checkpoint file, or null to train it."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long; the machine's settings are those of the run's own trainer section."""
