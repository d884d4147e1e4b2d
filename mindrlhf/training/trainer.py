"""A training run from top to bottom, made of the steps that MindFormers' trainers have in all releases."""
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import mindspore as ms
from mindformers.core.callback import build_callback
from mindformers.tools.check_rules import check_rules
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.trainer.base_trainer import BaseTrainer
from mindformers.trainer.utils import check_runner_config, set_seed
from mindspore.train.callback import Callback

from mindrlhf import signals
from mindrlhf.checkpoints.save import WholeCheckpointMonitor, saving_first
from mindrlhf.compat.trainer import arguments_of_optimizer
from mindrlhf.training.best import Watch
from mindrlhf.training.evaluation import EvaluationMonitor, Evaluator
from mindrlhf.training.held_out import schedule_of
from mindrlhf.training.memory import check_memory, sizes_of_rows
from mindrlhf.training.monitor import RewardMonitor, writes_figures
from mindrlhf.training.plan import TrainingPlan, check_sink_size
from mindrlhf.training.start_from import Counters, StartingPoint
from mindrlhf.training.stopping import InterruptionGuard
from mindrlhf.weights.ckpt_file import read_notes

__all__ = ["RewardTrainer"]


@MindFormerRegister.register(MindFormerModuleType.TRAINER)
class RewardTrainer(BaseTrainer):
    """Trains what a configuration describes, as MindFormers' `CausalLanguageModelingTrainer` does.

    `BaseTrainer` makes the parts: data, network, optimizer and step. Their order, the callbacks', and loading are ours:
    releases of MindFormers differ in them, sort their own callbacks before others, choose a checkpoint by its time, and
    continue from random weights where names do not match.

    Args:
        task, model_name: for MindFormers' log
    """

    def train(self, plan: TrainingPlan, config, start: Optional[StartingPoint] = None,
              loaded: Callable[[], object] = lambda: None, event_folder: Optional[Path] = None) -> None:
        """Train.

        Args:
            plan:   what is trained
            config: the configuration that `set_up_mindspore` returned for it; completed in place
            start:  the checkpoint to start from; None: random weights
            loaded: called when a checkpoint that was cut anew is loaded
            event_folder: of the run's figures for TensorBoard; None: there are none

        Raises:
            UserError: the data, the checkpoint, or what happens while training.
            Interrupted: a signal has ended the run early, with a checkpoint.
        """
        semi_auto = plan.config.layout.semi_auto
        evaluator = Evaluator(plan.config, plan.held_out, plan.config.output) if plan.held_out else None
        if config.seed and not semi_auto:
            set_seed(config.seed)  # in semi-auto parallel MindSpore draws by the whole tensor's seed
        config = self.set_config(config, is_full_config=True)
        dataset = self.create_train_dataset()
        steps_of_epoch = dataset.get_dataset_size()
        check_sink_size(plan.config, steps_of_epoch)
        check_memory(plan.config, sizes_of_rows(plan.config, dataset))
        logger.info("the data has %d steps an epoch", steps_of_epoch)
        counters = None
        if start and start.resumed:
            counters = start.counters(self.global_batch_size, steps_of_epoch, plan.config.sink_mode)
            dataset.set_init_step(counters.steps)
        self._note(config, counters)
        self.set_train_dataset(dataset)
        check_runner_config(config, dataset)
        schedule = watch = None
        if evaluator:
            schedule, watch = schedule_of(plan.config, steps_of_epoch), _watch_of(plan, start if counters else None)
        first_step = config.runner_config.initial_step
        evaluates_first = bool(evaluator and schedule.is_due(first_step) and watch.step < first_step)
        over = bool(counters and counters.epoch >= config.runner_config.epochs)
        if over:
            logger.info("%s is the last step of this run: nothing is left to train", start.source)
            if not evaluates_first:
                return
        check_rules(config, mode="train", dataset=dataset)

        network = self.wrap_network_with_tool_cells(self.create_network(default_args={
            "parallel_config": config.parallel_config, "moe_config": config.moe_config}))
        self.set_network(network, is_train=True)
        self.count_parameters()
        optimizer = self.create_optimizer_scheduler(network, **arguments_of_optimizer(self.create_optimizer_scheduler))
        step = self.create_model_wrapper(network, optimizer)
        events = None
        if event_folder and writes_figures():
            from mindrlhf.training.event_file import EventFile  # imports tensorboardX
            events = EventFile(event_folder, plan.config.tensorboard, first_step, evaluates_first)
        callbacks = self._create_callbacks(config, optimizer, counters, {
            "evaluator": evaluator, "schedule": schedule, "watch": watch}, {"events": events})
        model = ms.Model(step)
        self._load(config, semi_auto, model, step, dataset, start, counters, evaluates_first)
        if plan.config.start.reshard:
            loaded()
        monitor = next((each for each in callbacks if isinstance(each, WholeCheckpointMonitor)), None)
        for callback in callbacks:
            if isinstance(callback, EvaluationMonitor):
                over |= callback.prepare(step.network, evaluates_first, monitor)
        if over:
            for callback in callbacks:
                if isinstance(callback, RewardMonitor):
                    callback.draw()
            return
        logger.info("training begins; compiling the step takes a while")
        with saving_first(callbacks):
            model.train(config.runner_config.epochs, dataset,
                        callbacks=[InterruptionGuard(), *callbacks],  # first: a step that is noted anywhere is saved
                        dataset_sink_mode=config.runner_config.sink_mode, sink_size=config.runner_config.sink_size,
                        initial_epoch=config.runner_config.initial_epoch)
        for callback in callbacks:
            if isinstance(callback, WholeCheckpointMonitor):
                callback.check_newest()
        signals.settle()
        logger.info("training is over")

    @staticmethod
    def _note(config, counters: Optional[Counters]) -> None:
        """Leave the counters where MindFormers' own steps and callbacks look for them."""
        config.runner_config.initial_step = counters.steps if counters else 0
        config.runner_config.initial_epoch = counters.epoch if counters else 0
        scale = config.runner_wrapper.scale_sense
        if counters and scale is not None:
            if hasattr(scale, "loss_scale_value"):
                scale.loss_scale_value = counters.loss_scale
            else:
                config.runner_wrapper.scale_sense = counters.loss_scale

    def _create_callbacks(self, config, optimizer, counters: Optional[Counters],
                          evaluation: Dict[str, Any], events: Dict[str, Any]) -> List[Callback]:
        """The YAML's callbacks in its order, with what the run alone knows."""
        runner = config.runner_config
        first_step = {"first_step": runner.initial_step}
        known: Dict[str, Dict[str, Any]] = {
            "RewardMonitor": {**first_step, **events},
            "SkippedStepMonitor": first_step,
            "EvaluationMonitor": {**evaluation, **first_step, **events},
            "MFLossMonitor": {
                "learning_rate": optimizer.learning_rate, "origin_epochs": runner.origin_epochs,
                "dataset_size": config.data_size, "micro_batch_num": config.parallel_config.micro_batch_num,
                "micro_batch_interleave_num": config.micro_batch_interleave_num,
                "initial_epoch": runner.initial_epoch, "initial_step": runner.initial_step,
                "global_batch_size": self.global_batch_size,
                "gradient_accumulation_steps": runner.gradient_accumulation_steps},
            "CheckpointMonitor": {
                "global_batch_size": self.global_batch_size,
                "append_info": [{"step_num": counters.steps, "epoch_num": counters.epoch,
                                 "loss_scale": counters.loss_scale}] if counters else None},
        }
        return [build_callback(callback, default_args=known.get(callback["type"])) for callback in config.callbacks]

    @staticmethod
    def _load(config, semi_auto: bool, model: ms.Model, step, dataset, start: Optional[StartingPoint],
              counters: Optional[Counters], evaluates_first: bool = False) -> None:
        """Give the network what it starts from. Slices are those of the compiled step, which is compiled first; so it
        is where an evaluation, which would cut otherwise, comes before it.
        """
        built = False
        if semi_auto and (config.only_save_strategy or (start and start.slices)):
            logger.info("compiling the step, which says how weights are sliced")
            model.build(train_dataset=dataset, epoch=config.runner_config.epochs,
                        sink_size=config.runner_config.sink_size)
            built = True
        if config.only_save_strategy:
            logger.info("only_save_strategy is True, nothing is trained: the strategy is %s", config.parallel[
                "strategy_ckpt_save_file"] if semi_auto else "none, the run is not semi-auto parallel")
            raise SystemExit(0)
        if start:
            if start.to_cut:
                start = start.cut_for_layout(config)
            logger.info(start.load(step, counters).as_text())
        if semi_auto and evaluates_first and not built:
            model.build(train_dataset=dataset, epoch=config.runner_config.epochs,
                        sink_size=config.runner_config.sink_size)


def _watch_of(plan: TrainingPlan, resumed: Optional[StartingPoint]) -> Watch:
    """The best evaluation so far, of a run that begins or goes on."""
    watch = Watch.of(plan.config.evaluation, plan.held_out[0].name)
    warning = watch.go_on((read_notes(resumed.resumed) or {}).get("evaluation")) if resumed else None
    if warning:
        logger.warning(warning)
    return watch
