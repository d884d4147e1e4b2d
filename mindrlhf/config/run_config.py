"""A run's configuration as its checks leave it: typed, complete and frozen, so that nobody looks a key up again."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Tuple

from mindrlhf.config.settings import Setting
from mindrlhf.models.glm4.dimensions import Dimensions
from mindrlhf.objective import Objective

__all__ = ["Batching", "Evaluation", "Layout", "Model", "RunConfig", "Start", "TensorBoard"]


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        dimensions:      of `model.model_config`
        parameter_type:  of the weights as training keeps them: float32, float16 or bfloat16
        compute_type:    of matrix products, likewise
        flash_attention: whether attention is Ascend's fused operator
        recompute:       `recompute_config.recompute`: True, False, or which layers
        pad_token_id:    fills up rows
    """

    dimensions: Dimensions
    parameter_type: str
    compute_type: str
    flash_attention: bool
    recompute: Any
    pad_token_id: int

    @property
    def seq_length(self) -> int:
        """Tokens of the longest text."""
        return self.dimensions.seq_length


@dataclass(frozen=True)
class Layout:
    """How a run is divided over processes.

    Attributes:
        device:            Ascend, GPU or CPU
        device_memory:     bytes that MindSpore may take of a device; None: not said
        parallel:          `use_parallel`: several processes
        semi_auto:         operators are cut over the processes, so that each has its slice of a checkpoint; otherwise
                           each has the whole model
        started:           processes of the job that this one belongs to, as msrun says; None: not started by it
        planned:           processes that the YAML's layout is for
        data, model, stages: copies of the model, parts of each weight, pipeline stages; 1 unless semi-auto
        micro_batches:     of a pipeline
        optimizer_sharded: the optimizer's state is spread over the data-parallel copies
        embedding_copied:  each process has the whole embedding (`vocab_emb_dp`)
    """

    device: str
    device_memory: Optional[int]
    parallel: bool
    semi_auto: bool
    started: Optional[int]
    planned: int
    data: int
    model: int
    stages: int
    micro_batches: int
    optimizer_sharded: bool
    embedding_copied: bool

    @property
    def processes(self) -> int:
        """Processes of the run: those that were started, or, before that, those that are planned."""
        if not self.parallel:
            return 1
        return self.started or self.planned

    def __str__(self) -> str:
        return f"data x model x pipeline = {self.data} x {self.model} x {self.stages}"


@dataclass(frozen=True)
class Batching:
    """How pairs become steps.

    Attributes:
        kind:           padded, buckets or packing
        size:           pairs (padded, buckets) or rows (packing) of a process's (micro-)batch
        accumulation:   (micro-)batches whose gradients a step adds up, outside pipelines
        row_length:     tokens of a row of `packing`; otherwise the model's sequence length
        shuffle:        another order of the pairs in each epoch
        drop_remainder: of `padded`: leave out the last, smaller batch
        seed:           of the order
        probabilities:  shares of several data sets of an epoch, as they are named; (): all pairs of all
        interleave:     under or over: see `mindrlhf.data.mixture`
    """

    kind: str
    size: int
    accumulation: int
    row_length: int
    shuffle: bool
    drop_remainder: bool
    seed: int
    probabilities: Tuple[float, ...]
    interleave: str

    @property
    def padded(self) -> bool:
        return self.kind == "padded"


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        checkpoint: file or folder; None: random weights
        resume:     continue with step and optimizer state
        reshard:    cut it again, for this run's layout (`auto_trans_ckpt`)
        strategy:   strategy file, or folder of them, of the layout that it was cut for; None: it is whole
    """

    checkpoint: Optional[str]
    resume: bool
    reshard: bool
    strategy: Optional[str]


@dataclass(frozen=True)
class Evaluation:
    """When a run evaluates held-out pairs, and what it does with the figures.

    Attributes:
        steps:     between two evaluations; 0: steps do not count
        epochs:    likewise
        at_start:  before the first step
        at_end:    after the last one
        best:      accuracy, loss or margin: which one is watched; None: none
        best_set:  of which set; None: the first one
        patience:  evaluations without improvement that end the run; None: they do not
        threshold: by how much the figure must be better to be an improvement
    """

    steps: int
    epochs: int
    at_start: bool
    at_end: bool
    best: Optional[str]
    best_set: Optional[str]
    patience: Optional[int]
    threshold: float


@dataclass(frozen=True)
class TensorBoard:
    """What a run writes for TensorBoard.

    Attributes:
        folder:     in which each run has a folder of its own; None: it is beside metrics.csv
        loss_scale: the loss scale of each step too
        timers:     time and rates of each step too
    """

    folder: Optional[Path]
    loss_scale: bool
    timers: bool


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration: the YAML with the flags in it.

    Attributes:
        path:     of the YAML, for messages
        mapping:  all of its keys, with defaults: what MindFormers is given
        output:   folder for logs, checkpoints and figures
        epochs:   of the data
        sink_mode: MindSpore feeds the device from a queue of its own
        checkpoints: the keys of the `CheckpointMonitor` callback; None: there is none
        model, layout, batching, objective, start: see there
        evaluation: while training; None: there is none
        tensorboard: None: nothing is written for it
        settings: values of `--set`, for messages
    """

    path: str
    mapping: Mapping[str, Any]
    output: Path
    epochs: int
    sink_mode: bool
    checkpoints: Optional[Mapping[str, Any]]
    model: Model
    layout: Layout
    batching: Batching
    objective: Objective
    start: Start
    evaluation: Optional[Evaluation] = None
    tensorboard: Optional[TensorBoard] = None
    settings: Tuple[Setting, ...] = ()

    @property
    def micro_batches(self) -> int:
        """Pieces that a step cuts a process's rows into: those of a pipeline, or whose gradients are added up."""
        return self.layout.micro_batches if self.layout.stages > 1 else self.batching.accumulation

    @property
    def global_batch(self) -> int:
        """Pairs (padded, buckets) or rows (packing) of a step, over all processes, as MindFormers counts them."""
        if not self.layout.semi_auto:
            return self.batching.size * self.layout.processes
        return self.batching.size * self.layout.data * self.micro_batches
