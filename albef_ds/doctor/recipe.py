"""The recipe, the DeepSpeed configuration and the data, read as a run would read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from albef_ds.build import with_vocabulary
from albef_ds.config import BatchPlan, Config, ConfigError, find_named, load_config, plan_batches
from albef_ds.data.annotations import AnnotationError, load_list
from albef_ds.data.augment import TrainTransform
from albef_ds.data.images import ImageError
from albef_ds.data.loader import open_data, use_dali
from albef_ds.data.shard_format import ShardError
from albef_ds.data.task_loader import build_samples
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.tokenizer import CaptionTokenizer, TokenizerError, load_tokenizer
from albef_ds.data.torch_loader import PretrainingSamples
from albef_ds.doctor.finding import Finding, judged, ok, problem, warning
from albef_ds.train import deepspeed_folder
from albef_ds.training.ds_config import DeepSpeedConfigError, load_deepspeed_config
from albef_ds.training.engine import engine_config

LOOKED_AT = 4  # images of each source that are decoded
ON_CPU = "zero2_cpu"


@dataclass
class Read:
    """What could be read; None: it could not, and a finding says why."""

    config: Config | None = None
    deepspeed: dict | None = None
    tokenizer: CaptionTokenizer | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether the DeepSpeed configuration is one for machines without a GPU."""
        return self.config is not None and Path(self.config.train.deepspeed).stem.startswith(ON_CPU)


def read_recipe(recipe: str, overrides: Sequence[str], deepspeed_config: str | None) -> tuple[Read, list[Finding]]:
    """Reads what a run reads before it touches data."""
    read, findings = Read(), []
    try:
        read.config = load_config(recipe, overrides)
    except ConfigError as error:
        return read, [problem("recipe", str(error), "correct the recipe or the command line")]
    name = deepspeed_config or read.config.train.deepspeed
    read.config = read.config.model_copy(update={"train": read.config.train.model_copy(update={"deepspeed": name})})
    findings.append(ok("recipe", f"{recipe}: {read.config.task}"))
    try:
        file = find_named(name, deepspeed_folder(), ".json")
        read.deepspeed = load_deepspeed_config(file)
        findings.append(ok("deepspeed file", f"{file}"))
    except (ConfigError, DeepSpeedConfigError) as error:
        findings.append(problem("deepspeed file", str(error), "see ds_configs/README.md"))
    try:
        read.tokenizer = load_tokenizer(read.config.data.tokenizer, read.config.data.sep_token)
        size = read.tokenizer.vocab_size
        read.config = with_vocabulary(read.config, size)
        findings.append(_vocabulary(size, read.config.model.text.vocab_size))
    except (TokenizerError, ConfigError) as error:
        findings.append(problem("tokenizer", str(error), "correct data.tokenizer or model.text.vocab_size"))
    findings += check_weights(read.config)
    return read, findings


def _vocabulary(tokens: int, embedded: int) -> Finding:
    shown = f"{tokens} tokens, the model embeds {embedded}"
    if embedded == tokens:
        return ok("tokenizer", shown)
    return warning("tokenizer", shown, "right only for weights trained with that many: leave out model.text.vocab_size")


def check_weights(config: Config) -> Iterator[Finding]:
    """Weights to start from: a path must be there; anything else is a name that is looked up when the run starts."""
    model = config.model
    named = {"model.weights": model.weights, "model.vision.weights": model.vision.weights}
    for key, source in (named | {"model.text.weights": model.text.weights}).items():
        if source is None:
            continue
        is_path = key == "model.weights" or Path(source).suffix in (".pth", ".pt", ".bin", ".safetensors", ".npz")
        yield judged(
            (Path(source).exists(), ok("weights", f"{key}: {source}")),
            (is_path, problem("weights", f"{key}: {source} is not there", "correct the path")),
            (True, ok("weights", f"{key}: {source}, fetched or taken from the cache when the run starts")),
        )


def check_batches(config: Config, deepspeed: dict | None, world_size: int) -> tuple[BatchPlan | None, Finding]:
    try:
        plan = plan_batches(config, world_size)
        if deepspeed is not None:
            engine_config(deepspeed, plan, config.train.clip)
    except ConfigError as error:
        fitting = [n for n in range(1, 2 * world_size + 1) if _divides(config, n)]
        advice = f"with these settings {', '.join(map(str, fitting[-6:]))} ranks would do" if fitting else "see above"
        return None, problem("batches", str(error), advice)
    return plan, ok("batches", str(plan))


def _divides(config: Config, world_size: int) -> bool:
    try:
        return bool(plan_batches(config, world_size))
    except ConfigError:
        return False


def check_loader(config: Config) -> Finding:
    try:
        dali = config.task == "pretraining" and use_dali(config.data.loader)
    except ConfigError as error:
        return problem("loader", str(error), "install DALI, or set data.loader=auto")
    return ok("loader", "DALI" if dali else "Pillow, in worker processes")


def check_data(config: Config, tokenizer: CaptionTokenizer) -> tuple[int, list[Finding]]:
    """Every source of training data by itself, and the files of evaluation; (samples to train on, findings)."""
    total, findings, data = 0, [], config.data
    key, sources = ("shards", data.shards) if data.shards and not data.train else ("train", data.train)
    if not sources or (data.train and data.shards):
        text = "data.train and data.shards are both set" if sources else "data.train and data.shards are empty"
        return 0, [problem("data", text, "name annotation files or shards to train on")]
    for source in sources:
        one = config.model_copy(update={"data": data.model_copy(update={key: (source,), "weights": ()})})
        samples, finding = check_source(source, one, tokenizer)
        total += samples
        findings.append(finding)
    if 0 < total < config.train.global_batch:
        text = f"{total} samples do not fill a step of train.global_batch {config.train.global_batch}"
        findings.append(problem("data", text, "lower train.global_batch"))
    for name in ("val", "test", "answer_list", "test_annotations"):
        if path := getattr(data, name):
            findings.append(check_file(f"data.{name}", Path(path), is_list=name in ("val", "test", "answer_list")))
    return total, findings


def check_source(source: str, config: Config, tokenizer: CaptionTokenizer) -> tuple[int, Finding]:
    """Opens one annotation file or folder of shards, and loads a few samples from all over it."""
    try:
        samples = open_samples(config, tokenizer)
    except (ConfigError, AnnotationError, ShardError) as error:
        return 0, problem("data", str(error), "correct the path or the file; data check SHARDS looks at shards closely")
    except (ValueError, OSError, ImportError) as error:
        return 0, problem("data", f"{source}: {error}", "correct the path or the file")
    places = sorted({round(i * (len(samples) - 1) / max(1, LOOKED_AT - 1)) for i in range(LOOKED_AT)})
    failed = []
    for place in places:
        try:
            samples.load(place, np.random.default_rng(0))
        except (ImageError, ShardError) as error:
            failed.append(str(error))
    shown = f"{source}: {len(samples)} samples, {len(places) - len(failed)} of {len(places)} looked at can be loaded"
    advice = "check data.image_root and what relative paths start from" if config.data.train else "pack them again"
    if not failed:
        return len(samples), ok("data", shown)
    shown += f": {failed[0]}"
    if len(failed) == len(places):
        return len(samples), problem("data", shown, advice)
    return len(samples), warning("data", shown, f"{advice}; others take the place of such samples")


def open_samples(config: Config, tokenizer: CaptionTokenizer):
    data, augment = config.data, config.data.augment
    transform = TrainTransform(
        config.model.vision.image_size,
        scale=augment.crop_scale,
        horizontal_flip=augment.horizontal_flip,
        randaugment=augment.randaugment,
    )
    if config.task != "pretraining":
        return build_samples(config, tokenizer, transform)
    text = TextPipeline(tokenizer, data.max_words, data.max_tokens, data.mlm_probability)
    return PretrainingSamples(open_data(data), text, transform)


def check_file(key: str, path: Path, is_list: bool) -> Finding:
    try:
        if is_list:
            return ok("data", f"{key}: {path}, {len(load_list(path))} entries")
        path.stat()
    except (AnnotationError, OSError) as error:
        return problem("data", f"{key}: {error}", "correct the path; evaluation comes at the end of the run")
    return ok("data", f"{key}: {path}")
