"""The configuration of `ampo-fast train-reward`: the sections of ampo_fast.config where they fit, its own where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ampo_fast.config import (
    ADVANCED,
    COLUMNS,
    DISAGREEMENT,
    BaseModelConfig,
    BaseOptimConfig,
    Columns,
    Count,
    Disagreement,
    Positive,
    RunDir,
    RunName,
    Section,
    Share,
    Trackers,
)


class RewardRunConfig(Section):
    """Where the run lives, how long it is, and who watches it."""

    name: RunName = Field("reward", description="The run directory is DIR/NAME; an existing one is never overwritten.")
    dir: RunDir = Field(Path("runs"), description="Parent of all run directories.")
    seed: int = Field(0, description="Seeds the held-out split, the order of the groups and a new head.")
    epochs: Positive = Field(3, description="Passes over the groups, unless stopped early.")
    trackers: Trackers = Field(
        (), description="tensorboard, wandb, or both as a list; metrics.jsonl is always written."
    )


class RewardDataConfig(Section):
    """Preference pairs, or groups of scored responses."""

    train: str = Field(
        ..., description="JSONL, JSON, Parquet, CSV or TSV file, or a `datasets` name (NAME or NAME:SPLIT)."
    )
    eval: str | None = Field(None, description="Held-out pairs or groups; default: prompts split off data.train.")
    columns: Columns = Field(default_factory=dict, description=COLUMNS, json_schema_extra=ADVANCED)
    eval_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="Share of the prompts held out where data.eval is not given."
    )
    max_tokens: Positive = Field(512, description="Of prompt and response together, template included.")
    overlong: Literal["truncate", "drop"] = Field(
        "truncate", description="Longer ones lose the response's end (counted), or are left out."
    )
    group_by_prompt: bool = Field(
        False, description="Pairs of one prompt become one group: only where scores compare across its pairs."
    )
    disagreement: Disagreement = Field("raise", description=DISAGREEMENT)
    max_missing_share: Share = Field(0.2, description="More responses without a score than this share is an error.")


class RewardModelConfig(BaseModelConfig):
    """The backbone; a head that its checkpoint lacks is new."""

    keep_blocks: Count | None = Field(
        None,
        description="Only the backbone's first so many blocks; 0, with pooling mean: its embeddings; default: all.",
    )
    pooling: Literal["native", "mean"] = Field(
        "native",
        description="What the head reads; mean: of a BERT-like encoder's tokens, by one more block, standardised.",
    )
    trained_blocks: Count | None = Field(
        None, description="Only the last so many blocks, what follows them and the head are trained; default: all."
    )
    cache_mib: Count = Field(
        4096, description="Memory for the frozen blocks' outputs, computed once for all epochs; 0: computed anew."
    )


class RewardLossConfig(Section):
    name: Literal["BradleyTerry", "MMPOReward", "MarginBT", "PCRM", "Listwise", "InfoNCA"] = Field(
        "BradleyTerry", description="Of ampo_fast.losses.reward_model."
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description='Its fields; MMPOReward\'s gamma is a number, {fit = "labels"} or {agreement = 0.75}.',
    )
    length_control: bool = Field(
        False,
        description="Trains on score + w log(tokens), w fitted to the length alone, and drops the term afterwards.",
    )


class RewardOptimConfig(BaseOptimConfig):
    prompts_per_step: Positive = Field(16, description="Groups per optimizer step.")
    micro_batch_tokens: Positive = Field(
        4096,
        description="Tokens per forward: of a decoder packed, of an encoder each text whole; a longer group runs alone.",
    )
    lr: Annotated[float, Field(gt=0.0)] = Field(2e-5, description="Peak learning rate of AdamW.")


class RewardEvalConfig(Section):
    per_epoch: Positive = Field(1, description="Evaluations on the held-out pairs in each epoch.")
    patience: Count = Field(2, description="Stop after this many without a better `monitor`; 0: never.")
    monitor: Literal["loss", "accuracy"] = Field("loss", description="What the exported model is the best in.")


class RewardTrainingConfig(Section):
    """One reward model."""

    run: RewardRunConfig = Field(default_factory=RewardRunConfig)
    data: RewardDataConfig
    model: RewardModelConfig
    loss: RewardLossConfig = Field(default_factory=RewardLossConfig)
    optim: RewardOptimConfig = Field(default_factory=RewardOptimConfig)
    eval: RewardEvalConfig = Field(default_factory=RewardEvalConfig)

    @model_validator(mode="after")
    def _check_across_sections(self) -> RewardTrainingConfig:
        if self.optim.micro_batch_tokens < self.data.max_tokens:
            raise ValueError(
                f"optim.micro_batch_tokens = {self.optim.micro_batch_tokens} holds no response of "
                f"data.max_tokens = {self.data.max_tokens}; raise the first or lower the second"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name
