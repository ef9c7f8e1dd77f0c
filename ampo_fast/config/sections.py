"""The sections of a run's configuration, one per stage, and what they must agree on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ampo_fast.types import Sampling

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


def _check_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError("must be one name, without a slash: the run directory is run.dir/run.name")
    return name


RunName = Annotated[str, AfterValidator(_check_name)]
RunDir = Annotated[Path, AfterValidator(Path.expanduser)]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb"], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]


ADVANCED = {"advanced": True}
"""Marks a field that help lists last."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1 in a number's place."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are for switches, which this is not")
        return value


Disagreement = Literal["raise", "scores", "drop"]
DISAGREEMENT = "Pairs whose chosen response has the lower score: an error, trust the scores, or leave out."


Columns = dict[str, str]
COLUMNS = "What the data calls a format's fields: --data.columns.prompt question --data.columns.chosen good."


class RunConfig(Section):
    """Where the run lives, how long it is, and who watches it."""

    name: RunName = Field("run", description="The run directory is DIR/NAME; an existing one is never overwritten.")
    dir: RunDir = Field(Path("runs"), description="Parent of all run directories.")
    seed: int = Field(0, description="Seeds prompts, sampling and selection.")
    steps: Positive = Field(100, description="Optimizer steps in the whole run.")
    epochs: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Passes over data.train, in place of steps; 0: steps decides."
    )
    trackers: Trackers = Field(
        ("tensorboard",), description="tensorboard, wandb, both as a list, or []; metrics.jsonl is always written."
    )
    timeout_s: Annotated[float, Field(gt=0.0)] = Field(
        1800.0, description="How long a rank waits for the others before it names the one that hangs."
    )


class DataConfig(Section):
    """Prompts, or multi-response data with rewards (then rollout.engine = "data")."""

    train: str = Field(
        ...,
        description="JSONL, JSON, Parquet, CSV or TSV file, package:NAME, or a `datasets` name (NAME or NAME:SPLIT).",
    )
    eval: str | None = Field(None, description="Held-out prompts, same formats.")
    columns: Columns = Field(default_factory=dict, description=COLUMNS, json_schema_extra=ADVANCED)
    active_pairs: Count = Field(
        0, description="Only so many pairs, those that tell the last layer most (D-optimal: ADPO, APO); 0: all."
    )
    disagreement: Disagreement = Field("raise", description=DISAGREEMENT, json_schema_extra=ADVANCED)
    max_prompt_tokens: Positive = Field(1024, description="Longer prompts are left out and counted.")
    max_overlong_share: Share = Field(
        0.1, description="More over-long prompts than this share is an error.", json_schema_extra=ADVANCED
    )


class LoraConfig(Section):
    """A low-rank adapter instead of all parameters; needs ampo_fast[lora]."""

    rank: Count = Field(0, description="Of the adapter; 0: none, all parameters are trained.")
    alpha: Annotated[float, Field(gt=0.0)] = Field(16.0, description="The adapter is scaled by alpha / rank.")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="PEFT's: all-linear (without the head), endings of layers' names, or one pattern."
    )
    dropout: float = Field(0.0, description="Must stay 0: the same response must have the same log-prob twice.")

    @model_validator(mode="after")
    def _check_dropout(self) -> LoraConfig:
        if self.dropout:
            raise ValueError(f"model.lora.dropout = {self.dropout}: the policy is trained without dropout; set it to 0")
        return self


class BaseModelConfig(Section):
    """What `ampo-fast train` and `train-reward` both ask of a model."""

    path: str = Field(..., description="A HuggingFace model directory or name, or package:smollm2-135m-instruct.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Compute only; parameters stay float32.")
    attention: Literal["auto", "segments", "unshared"] = Field(
        "auto",
        description="segments: each prompt runs once for its group. unshared: once per response. auto: segments where possible.",
    )
    trust_remote_code: bool = Field(False, description="Run model code that comes with the checkpoint.")


class ModelConfig(BaseModelConfig):
    compile: bool = Field(
        False, description="torch.compile of the layers in training: minutes to start, then less time between products."
    )
    liger: bool = Field(
        False,
        description="Liger's kernels in the layers, on a GPU; needs ampo_fast[liger].",
        json_schema_extra=ADVANCED,
    )
    lora: LoraConfig = Field(
        default_factory=LoraConfig,
        description="--model.lora.rank 16 trains an adapter instead of all parameters; needs ampo_fast[lora].",
    )

    @property
    def without_adapter(self) -> ModelConfig:
        return self.model_copy(update={"lora": LoraConfig()})


class RolloutConfig(Section):
    engine: Literal["transformers", "vllm", "vllm-server", "data"] = Field(
        "transformers", description="Who samples; data: responses come from data.train. vllm needs ampo_fast[vllm]."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Of the vllm engines, fields of engine_config.VllmConfig."
    )
    n: Annotated[int, Field(ge=2)] = Field(8, description="Candidates per prompt.")
    prompts_per_round: Count = Field(0, description="Prompts answered before training on them; 0: one step's worth.")
    updates_per_round: Positive = Field(1, description="Passes over a round's groups before the next round.")
    max_staleness: Annotated[int, Field(ge=0, le=1)] | None = Field(
        None,
        description="Rounds that sampling may be ahead of training. 0: one after the other, strictly on-policy. "
        "Default: 1 for vllm-server, 0 for the others, which share the trainer's cores.",
    )
    temperature: Annotated[float, Field(gt=0.0)] = Field(1.0, description="Of sampling; the loss is at 1.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="1: off.")
    top_k: Count = Field(0, description="0: off.")
    max_new_tokens: Positive = Field(64, description="The length limit of a response, end-of-turn token included.")
    batch_rows: Positive | None = Field(
        None,
        description="Candidates decoded together; each has keys and values in memory. Default: 512 on a GPU, where a token takes "
        "about as long for few as for many; 64 on a CPU.",
        json_schema_extra=ADVANCED,
    )
    truncated: Literal["negative", "exclude", "keep"] = Field(
        "negative", description="A response cut by max_new_tokens: never the positive, left out, or treated as whole."
    )
    segment_tokens: Count = Field(
        0,
        description="So many tokens of each given answer are written anew: the worse answer of a pair (SAPO); 0: off.",
        json_schema_extra=ADVANCED,
    )
    replay: Count = Field(
        0,
        description="So many of the newest groups are kept, and a round's are drawn from them, the seldom drawn first; 0: off.",
        json_schema_extra=ADVANCED,
    )

    def sampling(self, seed: int, step: int = 0) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            seed=seed,
            step=step,
        )


def is_given(kind: str) -> bool:
    """Whether a kind of reward is what came with the data."""
    return kind == "data" or kind.startswith("data:")


class RewardConfig(Section):
    kind: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "relevance",
        description="relevance, data, data:SCORE, classifier:PATH, http(s)://URL, or MODULE:FUNCTION(prompts, responses) -> "
        "floats, one for each response, its prompt a list of {role, content}; or a list of these: each is normalised, then they "
        "are averaged.",
    )
    normalize: Literal["auto", "none", "minmax", "zscore", "sigmoid", "win_rate"] = Field(
        "auto",
        description="Applied once per group. auto: win_rate (against the other candidates) for CaPO and for several rewards, "
        "minmax for group-contrastive losses, none for the others.",
    )
    max_missing_share: Share = Field(
        0.2, description="More NaN or missing rewards than this share stops the run.", json_schema_extra=ADVANCED
    )
    tol: Annotated[float, Field(ge=0.0)] | None = Field(
        None,
        description="Raw rewards spread no wider than this make a group degenerate; default 1e-6 + 1e-3 x median spread.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Of an http:// scorer: engine_config.HttpConfig.")

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    @property
    def is_given(self) -> bool:
        """Whether a reward comes with the data: it exists for the data's own responses alone."""
        return any(map(is_given, self.kinds))


class EmbedConfig(Section):
    model: str = Field(
        "package:all-minilm-l6-v2", description='A sentence encoder, or "policy": mean-pooled hidden states.'
    )
    batch_rows: Positive = Field(64, description="Texts embedded together.", json_schema_extra=ADVANCED)


_STRATEGIES = ("bottom_k", "coreset", "k_center", "opt_select", "opt_select_exact", "best_worst", "random")


def _check_strategy(name: str) -> str:
    if name not in _STRATEGIES and ":" not in name:
        raise ValueError(f"known: {', '.join(_STRATEGIES)}; or MODULE:FUNCTION, one of your own")
    return name


class SelectConfig(Section):
    strategy: Annotated[str, AfterValidator(_check_strategy)] = Field(
        "opt_select",
        description=f"One of {', '.join(_STRATEGIES)}, or MODULE:FUNCTION(embeddings, rewards, k) -> indices of up to k "
        "negatives, where row 0 is the positive.",
    )
    k: Positive = Field(7, description="Negatives per prompt, beside the positive.")
    coverage: Literal["candidates", "all"] = Field(
        "candidates",
        description="Whose distances the coverage cost sums up: all candidates but the positive's, or its too.",
        json_schema_extra=ADVANCED,
    )
    pareto: bool = Field(
        False,
        description="The positive from the front that no candidate beats by every reward, negatives that it beats (CaPO).",
        json_schema_extra=ADVANCED,
    )


class LossConfig(Section):
    name: str = Field("AMPO", description="A class of ampo_fast.losses, or MODULE:CLASS, a losses.Loss of your own.")
    params: dict[str, Any] = Field(default_factory=dict, description="Its fields: --loss.params.beta 10.")
    nll_weight: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Adds this times the positive's mean NLL.")


class ReferenceConfig(Section):
    """The reference of losses that divide by one: the model that training started from, unless it follows the policy."""

    every: Count = Field(0, description="Steps after which the reference moves to the policy; 0: never.")
    decay: Decay = Field(
        0.0,
        description="What stays of the reference as it moves; 0: it becomes the policy (TSO), 0.5 at every 1: SAPO.",
        json_schema_extra=ADVANCED,
    )


class BaseOptimConfig(Section):
    """What `ampo-fast train` and `train-reward` both ask of a step."""

    prompts_per_step: Positive = Field(8, description="Groups per optimizer step, over all ranks.")
    micro_batch_tokens: Positive = Field(
        4096, description="Packed tokens per forward; a group that is longer runs in parts, and forward twice."
    )
    lr: Annotated[float, Field(gt=0.0)] = Field(1e-6, description="Peak learning rate of AdamW.")
    min_lr_ratio: Share = Field(0.0, description="The cosine ends at this share of lr; 1: constant after the warmup.")
    warmup_ratio: Share = Field(0.1, description="Share of the steps with a linearly rising rate.")
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.95), description="AdamW's decay of both moments.", json_schema_extra=ADVANCED
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.0, description="AdamW's decoupled decay.")
    max_grad_norm: Annotated[float, Field(gt=0.0)] = Field(1.0, description="Gradients are clipped to this norm.")


class OptimConfig(BaseOptimConfig):
    activation_checkpointing: bool = Field(
        False, description="Keep only each layer's input and run it again in the backward: less memory, a third slower."
    )


class EvalConfig(Section):
    every: Count = Field(0, description="Steps between evaluations; 0: before and after only.")
    prompts: Count = Field(32, description="Held-out prompts used.")
    samples: Annotated[int, Field(ge=2)] = Field(2, description="Answers per held-out prompt.")
    seed: int = Field(1234, description="The same answers' noise at every evaluation.")
    reward: str | None = Field(None, description="Scorer of held-out answers, as reward.kind; default: that one.")
    max_kl: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Stop when KL to the start (nats per token) passes this."
    )
    patience: Count = Field(0, description="Stop after this many evaluations without a better reward; 0: never.")

    @field_validator("reward")
    @classmethod
    def _check_reward(cls, reward: str | None) -> str | None:
        if reward is not None and is_given(reward):
            raise ValueError(
                "held-out prompts are answered anew, and the data rates no such answer; name a scorer: relevance, "
                "classifier:PATH, http(s)://URL or MODULE:FUNCTION"
            )
        return reward


class CheckpointConfig(Section):
    every: Count = Field(50, description="Steps between checkpoints; 0: only at the end.")
    keep_last: Positive = Field(2, description="How many of the newest checkpoints stay.")
    keep_every: Count = Field(0, description="Keep every step that this divides, for good; 0: none.")
    asynchronous: bool = Field(
        False, description="Write from a copy in host memory (12 bytes a trained parameter) while training goes on."
    )
    save_best: bool = Field(
        True, description="Export to best/ the policy whose evaluation is the best so far, the start's included."
    )


class Config(Section):
    """One training run."""

    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig
    model: ModelConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    select: SelectConfig = Field(default_factory=SelectConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        if self.rollout.engine != "data" and self.rollout.n < self.select.k + 1:
            raise ValueError(
                f"rollout.n = {self.rollout.n} candidates cannot give 1 positive + select.k = {self.select.k} negatives; "
                f"raise rollout.n to at least {self.select.k + 1} or lower select.k"
            )
        if self.select.strategy == "best_worst" and self.select.k != 1:
            raise ValueError(
                f'select.strategy = "best_worst" keeps one negative, select.k is {self.select.k}; set select.k = 1'
            )
        round_prompts = self.rollout.prompts_per_round
        if round_prompts and round_prompts % self.optim.prompts_per_step:
            raise ValueError(
                f"rollout.prompts_per_round = {round_prompts} is not a multiple of "
                f"optim.prompts_per_step = {self.optim.prompts_per_step}"
            )
        if self.data.active_pairs and self.rollout.engine != "data":
            raise ValueError(
                f'data.active_pairs = {self.data.active_pairs} chooses among given pairs: it needs rollout.engine = "data"'
            )
        if self.rollout.segment_tokens and self.reward.kind != "data":
            raise ValueError(
                f"rollout.segment_tokens = {self.rollout.segment_tokens} sets given answers above what is written anew: it "
                f'needs rollout.engine = "data" and reward.kind = "data", which is {self.reward.kind!r}'
            )
        if self.reward.is_given != (self.rollout.engine == "data"):
            raise ValueError(
                'reward.kind = "data" and rollout.engine = "data" go together: given responses carry their rewards'
            )
        if self.select.pareto and len(self.reward.kinds) < 2:
            raise ValueError(
                f"select.pareto = true compares several rewards, reward.kind = {self.reward.kind!r} is one; give a list"
            )
        if self.max_staleness and self.rollout.engine != "vllm-server":
            raise ValueError(
                f"rollout.max_staleness = {self.max_staleness} needs an engine that samples beside the trainer: "
                f'rollout.engine = "{self.rollout.engine}" shares its cores or GPU; set rollout.engine = "vllm-server" or '
                "rollout.max_staleness = 0"
            )
        context = self.rollout.options.get("max_model_len")
        if isinstance(context, int) and 0 < context <= self.rollout.max_new_tokens:
            raise ValueError(
                f"rollout.options.max_model_len = {context} is for prompt and response together, and "
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens} leaves no room for a prompt; raise the first or lower "
                "the second"
            )
        return self

    @property
    def prompts_per_round(self) -> int:
        return self.rollout.prompts_per_round or self.optim.prompts_per_step

    @property
    def steps_per_round(self) -> int:
        return self.prompts_per_round // self.optim.prompts_per_step * self.rollout.updates_per_round

    @property
    def max_staleness(self) -> int:
        given = self.rollout.max_staleness
        return int(self.rollout.engine == "vllm-server") if given is None else given

    def with_steps_for(self, num_prompts: int) -> Config:
        """The same with run.steps for run.epochs passes over so many prompts, where that is given."""
        if not self.run.epochs:
            return self
        rounds = self.run.epochs * num_prompts / self.prompts_per_round
        steps = math.ceil(round(rounds * self.steps_per_round, 6))  # a part of a step is one
        return self.model_copy(update={"run": self.run.model_copy(update={"steps": steps})})

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name
