"""The typed configuration of a run: a YAML recipe and `key.sub=value` overrides, checked before anything is built."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from albef_ds.plain_yaml import LARGEST, parse_yaml


class ConfigError(ValueError):
    """A recipe or override that cannot be used; the message names the file and the key."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VisionConfig(_Section):
    image_size: int = Field(256, gt=0)  # pixels
    patch_size: int = Field(16, gt=0)
    width: int = Field(768, gt=0)
    layers: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    weights: str | None = None  # timm's name or a local file; None: random


class TextConfig(_Section):
    vocab_size: int | None = Field(None, gt=0)  # None: the tokenizer's
    width: int = Field(768, gt=0)
    layers: int = Field(12, gt=1)
    fusion_layer: int = Field(6, gt=0)  # the first layer with cross-attention
    heads: int = Field(12, gt=0)
    mlp_width: int = Field(3072, gt=0)
    max_positions: int = Field(512, gt=0)
    type_vocab_size: int = Field(2, gt=0)
    layer_norm_eps: float = 1e-12
    dropout: float = Field(0.1, ge=0, lt=1)
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    pad_token_id: int = 0
    weights: str | None = None  # Hugging Face's name or a local folder; None: random


class OptionsConfig(_Section):
    """What changes the mathematics; all off, as in the reference. On the demo: benchmarks/results/options.md."""

    # Share of the pairs mixed with another one, images blended, texts joined (MixGen); the paper: 0.25; 0: off.
    mixgen: float = Field(0.0, ge=0, le=0.5)
    negatives: Literal["rank", "all"] = "rank"  # whose samples may be hard negatives: this rank's, or those of all
    # Share of the image's patches that the student does not see while training (FLIP); the teacher sees all; 0: off.
    token_drop: float = Field(0.0, ge=0, lt=1)


class ModelConfig(_Section):
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = Field(256, gt=0)
    queue_size: int = Field(65536, gt=0)
    momentum: float = Field(0.995, ge=0, le=1)
    distill: bool = True  # whether a fine-tuning task learns from a teacher too (retrieval always has one)
    teacher_dropout: bool = True  # the reference's teacher keeps dropout on
    temperature: float = Field(0.07, gt=0)
    temperature_min: float = Field(0.001, gt=0)
    temperature_max: float = Field(0.5, gt=0)
    attention: Literal["auto", "flash", "varlen", "efficient", "sdpa", "eager"] = "auto"
    compile: Literal["off", "auto"] = "off"  # auto: compiled regions on a GPU; on a CPU they cost more than they give
    weights: str | None = None  # an ALBEF checkpoint of the reference's form to start from
    options: OptionsConfig = OptionsConfig()

    @model_validator(mode="after")
    def _consistent(self):
        for name, part in (("vision", self.vision), ("text", self.text)):
            if part.width % part.heads:
                raise ValueError(f"{name}.width {part.width} is not a multiple of {name}.heads {part.heads}")
        if not self.temperature_min <= self.temperature <= self.temperature_max:
            raise ValueError("temperature must lie between temperature_min and temperature_max")
        return self


class AugmentConfig(_Section):
    crop_scale: tuple[float, float] | None = (0.2, 1.0)  # share of the area that a random crop keeps; null: no crop
    horizontal_flip: bool = True
    randaugment: bool = True


class DataConfig(_Section):
    train: tuple[str, ...] = ()  # annotation files of the reference's form; or else:
    shards: tuple[str, ...] = ()  # folders made by `albef_ds data pack`, here or URLs (https://, s3://, ...)
    weights: tuple[float, ...] = ()  # of each folder: how often an epoch goes through it; none: once
    shuffle_buffer: int = Field(100_000, gt=0)  # samples of shards that are shuffled among each other
    on_bad_shard: Literal["fatal", "skip"] = "fatal"  # missing, cut short or changed: stop, or put other samples there
    max_rejects: int | None = Field(10_000, ge=0)  # unusable samples of a rank; more stop the run; null: no limit
    cache_dir: str | None = None  # local folder for the shards of URLs
    cache_gb: float = Field(50.0, gt=0)  # what it may hold, all ranks of a machine together
    loader: Literal["auto", "torch", "dali"] = "auto"  # auto: DALI where it is installed
    val: str | None = None  # as test; evaluated while training (evaluation.every), the best weights are kept
    test: str | None = None  # annotations that are evaluated at the end
    image_root: str | None = None  # what relative image paths start from; None: the annotation file's folder
    image_roots: dict[str, str] = {}  # VQA: that of each "dataset", such as {vqa: ..., vg: ...}
    answer_list: str | None = None  # VQA: the answers to choose from, a JSON list; None: answers are written freely
    test_annotations: str | None = None  # VQA: the official file of what the annotators said, for the accuracy
    vg_weight: float = Field(0.5, gt=0)  # VQA: of the one answer to a Visual Genome question
    # VQA, entailment, NLVR2: questions or sentences of an image (or pair) in a batch. Above 1 the image is read once
    # for all of them; train.global_batch then counts images (or pairs).
    texts_per_image: int = Field(1, gt=0)
    tokenizer: str = "bert-base-uncased"  # a hub name, a folder or a vocab.txt
    sep_token: bool = False  # the reference's tokenizer emits no [SEP]
    max_words: int = Field(30, gt=0)
    max_tokens: int = Field(25, gt=1)
    mlm_probability: float = Field(0.15, ge=0, le=1)
    augment: AugmentConfig = AugmentConfig()
    workers: int = Field(4, ge=0)  # loader processes a rank; with DALI: threads


class OptimizerConfig(_Section):
    name: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, training/muon.py
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.02, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    fused: Literal["torch", "apex"] = "torch"  # whose AdamW kernel; apex: NVIDIA's, which must be installed
    muon_lr_ratio: float = Field(3.0, gt=0)  # Muon's learning rate as a multiple of lr


class ScheduleConfig(_Section):
    name: Literal["reference", "paper", "linear", "constant"] = "reference"
    min_lr: float = Field(1e-5, ge=0)
    warmup_lr: float = Field(1e-5, ge=0)
    warmup_steps: int | None = Field(None, ge=0)  # None: the schedule's own (reference 2,000; paper, linear 1,000)


class TrainConfig(_Section):
    epochs: int = Field(30, gt=0)
    max_steps: int | None = Field(None, gt=0)  # ends earlier (or goes on longer) than the epochs say
    global_batch: int = Field(512, gt=0)  # samples an optimiser step, over all ranks
    micro_batch: int | None = Field(None, gt=0)  # samples a forward pass of one rank; None: global_batch / ranks
    clip: float = Field(0.0, ge=0)  # largest gradient norm; 0: no clipping, as the reference
    activation_checkpointing: bool = False
    alpha: float = Field(0.4, ge=0, le=1)  # weight of the teacher's soft targets
    alpha_ramp_epochs: float = Field(1.0, ge=0)
    deepspeed: str = "zero2_a100_40gb"  # a file, or a name in ds_configs/
    seed: int = 42
    deterministic: bool = False  # the same bits on the same device, every time; slower on a GPU


class CheckpointConfig(_Section):
    every: int = Field(1000, gt=0)  # steps
    keep: int = Field(2, gt=0)  # the newest complete ones
    keep_every: int | None = Field(None, gt=0)  # also those of every so many steps, for good
    background: bool = True  # training waits for a copy in memory only, not for the disk
    on_error: Literal["retry", "stop", "continue"] = "retry"  # when the disk fails: try again, then stop; stop; go on
    retries: int = Field(5, ge=0)  # further attempts, after 1, 2, 4, ... seconds
    upload: str | None = None  # a URL (s3://, gs://, file://, ...), this run's own, that gets a copy of each
    resume: str | None = "auto"  # auto: the newest complete one of this run; none: start afresh; or a folder


class FaultsConfig(_Section):
    max_bad_steps: int = Field(10, gt=0)  # steps in a row whose loss or gradient is not finite; then the run stops
    dead_seconds: float = Field(60, gt=0)  # a rank without a sign of life for so long is lost, and the run ends
    timeout_minutes: float = Field(30, gt=0)  # a rank whose loop stands still for so long hangs, and the run ends
    rollback: bool = False  # after a loss spike: back to the last checkpoint, and past the batches of the spike
    rollback_window: int = Field(100, ge=8)  # steps whose median loss is the usual one
    rollback_threshold: float = Field(10.0, gt=0)  # a spike exceeds the median by so many median deviations from it ...
    rollback_steps: int = Field(3, gt=0)  # ... for so many steps in a row
    rollback_max: int = Field(3, gt=0)  # roll-backs of one run; a further spike stops it


class LogConfig(_Section):
    every: int = Field(50, gt=0)  # steps
    report: bool = True
    keys: bool = False  # writes which samples every step had, a file a rank


class EvaluationConfig(_Section):
    every: int | None = Field(None, gt=0)  # epochs between evaluations on data.val; None: none
    k_test: int = Field(128, gt=0)  # candidates a query that ITM ranks again; VQA: answers ranked by their whole text
    batch: int = Field(64, gt=0)  # samples of a forward pass (VQA, entailment, NLVR2, grounding)
    first_token_twice: bool = True  # VQA: ranks as the reference does (albef_ds/evaluation/answers.py)
    beams: int = Field(3, gt=0)  # VQA without a list: of the beam search
    heatmap: Literal["itm", "itc"] = "itm"  # grounding: what Grad-CAM looks at
    heatmap_layer: int | None = Field(
        None, ge=0
    )  # BERT's layer (itm) or ViT's block (itc); None: the third fusion layer
    relations: bool = False  # grounding: "left of", "above" and the like are judged by the proposals' places


class Config(_Section):
    """A run. The recipes in albef_ds/configs show every section in use."""

    task: Literal["pretraining", "retrieval", "vqa", "entailment", "text_assignment", "nlvr", "grounding"] = (
        "pretraining"
    )
    output_dir: str = "runs/pretraining"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _options_apply(self):
        options = self.model.options
        if options != OptionsConfig() and self.task not in ("pretraining", "retrieval", "grounding"):
            changed = ", ".join(f"model.options.{key}" for key in options.model_dump(exclude_defaults=True))
            raise ValueError(
                f"{changed}: for pretraining, retrieval and grounding only, the task is {self.task}; leave it out"
            )
        joined, positions = 2 * self.data.max_tokens - 1, self.model.text.max_positions  # one [CLS] for both
        if options.mixgen and joined > positions:
            raise ValueError(
                f"model.options.mixgen joins two texts of up to data.max_tokens = {self.data.max_tokens} tokens into "
                f"{joined}, more than model.text.max_positions = {positions}: raise that, or lower data.max_tokens"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class BatchPlan(_Section):
    """How the global batch divides over ranks, micro-batches and accumulation."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch} samples a step = {self.micro_batch} a forward pass x {self.accumulation} accumulated "
            f"x {self.world_size} ranks"
        )


def plan_batches(config: Config, world_size: int) -> BatchPlan:
    """Raises ConfigError where the numbers do not divide, or where a step's features would not fit the queue."""
    batch = config.train.global_batch
    if batch % world_size:
        raise ConfigError(f"train.global_batch {batch} does not divide over {world_size} ranks")
    micro = config.train.micro_batch or batch // world_size
    if (batch // world_size) % micro:
        raise ConfigError(
            f"train.micro_batch {micro} does not divide a rank's share of {batch // world_size} samples "
            f"(train.global_batch {batch} over {world_size} ranks)"
        )
    if config.task == "text_assignment" and micro < 3:
        raise ConfigError(f"train.micro_batch is {micro}: text assignment needs at least 3, a text's own image and two")
    if config.task in ("pretraining", "retrieval", "grounding") and batch > config.model.queue_size:
        raise ConfigError(
            f"train.global_batch {batch} is larger than model.queue_size {config.model.queue_size}: a step's features "
            "would not fit; raise the one or lower the other"
        )
    return BatchPlan(
        global_batch=batch, micro_batch=micro, accumulation=batch // world_size // micro, world_size=world_size
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies `key.sub=value` overrides (values are YAML).

    Args:
        path: a YAML file, or the name of a recipe that ships with the package.

    Raises:
        ConfigError: naming the file and the key, with the nearest known key where one is unknown.
    """
    file = find_named(path, Path(__file__).parent / "configs", ".yaml")
    try:
        with open(file, encoding="utf-8") as opened:
            raw = parse_yaml(opened.read(LARGEST + 1)) or {}
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: a recipe is a mapping of sections, found {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(file, e) for e in error.errors())) from None


def find_named(path: str | Path, folder: Path, suffix: str) -> Path:
    """`path` itself where it is a file, else folder/path.suffix; ConfigError lists what there is."""
    candidates = [Path(path), folder / f"{path}{suffix}", folder / str(path)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for p in folder.glob(f"*{suffix}"))
    raise ConfigError(f"{path}: no such file, nor one of {', '.join(known)}{_suggest(str(path), known)}")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.sub=value, e.g. optimizer.lr=1e-4")
    *sections, leaf = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        raw[leaf] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


def _explain(file: Path, error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{file}: unknown key {key!r}{_suggest(key, _all_keys(Config))}"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict | BaseModel) else f", got {_shown(error['input'])}"
    return f"{file}: {key}: {message}{shown}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _suggest(key: str, known: Sequence[str]) -> str:
    # The same leaf in another section is the commonest slip, a typing error in the leaf the next.
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
