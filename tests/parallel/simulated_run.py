"""One process of a run on several devices, on a machine that has none of them; started by test_layouts.py.

    simulated_run.py RANK RANKS CONFIG DATA [--KEY VALUE ...] [--weights FILE.npz]

The run is the real one, from the check of the YAML to MindFormers' trainer, whose compilation of the training step
contains MindSpore's parallel pass. MindSpore's simulation stands in for the other processes, empty libraries for the
devices (cuda_stubs.py). Compilation ends before kernels are chosen, so nothing is computed. With `only_save_strategy`
in the YAML the run ends there; otherwise it ends before the first step, and the parameters that it would start with,
this rank's slices of the checkpoint, go to a file. With --evaluate they are those of `Scorer`.
"""
import argparse
import os
import sys


def arguments():
    parser = argparse.ArgumentParser()
    for name in ("rank", "ranks", "config", "train_dataset"):
        parser.add_argument(name)
    parser.add_argument("--load_checkpoint")
    parser.add_argument("--src_strategy")
    parser.add_argument("--auto_trans_ckpt", action="store_true", default=None)
    parser.add_argument("--resume", action="store_true", default=None)
    parser.add_argument("--weights")
    parser.add_argument("--evaluate", metavar="CHECKPOINT")
    parser.add_argument("--eval_dataset", nargs=1, help="compile an evaluation too, where the run has one")
    parser.add_argument("--unchecked", action="store_true", help="leave out the checks before the run")
    parser.set_defaults(seq_length=None, use_parallel=None, tokenizer=None,
                        task="text_generation")
    return parser.parse_args()


def compile_step(model, train_dataset, valid_dataset=None, sink_size=-1, epoch=1, sink_mode=True):
    """`Model._init` of MindSpore 2.7, which is for Ascend only, without its warming-up of the device's data queue."""
    train_dataset.__no_send__ = True
    inputs, network = model._exec_preprocess(is_train=True, dataset=train_dataset, dataset_sink_mode=sink_mode,
                                             sink_size=sink_size)
    network.compile(*next(iter(inputs)))
    model._train_network.parameter_layout_dict = network.parameter_layout_dict


def main():
    args = arguments()
    os.environ.update(MS_SIMULATION_LEVEL="0", RANK_ID=args.rank, RANK_SIZE=args.ranks,
                      OMPI_COMMAND="simulated", PMIX_RANK=args.rank,  # without these there must be a scheduler
                      MS_DEV_PRECOMPILE_ONLY="1")
    import mindspore as ms
    import numpy as np
    from mindformers.tools import ckpt_transform

    import mindrlhf.processes
    import mindrlhf.training.evaluation
    import mindrlhf.training.run_folder
    import mindrlhf.training.start_from
    from mindrlhf.config.check import typed_config
    from mindrlhf.config.read import read_config
    from mindrlhf.data.record_set import RecordSet
    from mindrlhf.scoring.scorer import Scorer
    from mindrlhf.set_up import set_up_mindspore
    from mindrlhf.training.plan import TrainingPlan, plan_training
    from mindrlhf.training.train import train

    def keep(network):
        np.savez(args.weights, **{parameter.name: parameter.asnumpy() for parameter in network.get_parameters()})

    def stop(model, _, train_dataset, **kwargs):
        compile_step(model, train_dataset, sink_size=kwargs["sink_size"])
        for callback in kwargs["callbacks"]:
            if isinstance(callback, mindrlhf.training.evaluation.EvaluationMonitor):
                callback._evaluate(1)
        keep(model._network)
        sys.exit()

    def compile_evaluation(evaluator, network):
        with mindrlhf.training.evaluation._evaluating(network):
            network.compile(*evaluator.inputs())
        sys.stdout.write("an evaluation is compiled\n")
        return iter(())

    mindrlhf.training.evaluation.Evaluator.evaluate = compile_evaluation
    # Nothing is sent, and nobody waited for: the others find the same in the same files.
    mindrlhf.processes.meet = lambda: None
    for module in (mindrlhf.training.start_from, mindrlhf.training.run_folder, mindrlhf.scoring.scorer):
        module.stack_over_processes = lambda values: np.stack([values] * int(args.ranks))
    mindrlhf.training.train.put_strategies_away = lambda *places: None  # the slices of the others are looked at
    ckpt_transform.transform_checkpoint.barrier_world = lambda action: None
    ms.train.Model._init, ms.train.Model.train = compile_step, stop
    held_out = ()
    if args.unchecked or args.evaluate:
        mapping, records = read_config(args.config), RecordSet.open(args.train_dataset)
    else:
        plan = plan_training(args)
        mapping, records, held_out = plan.config.mapping, plan.records, plan.held_out
    mapping["context"]["device_target"] = "GPU"
    config = typed_config(args.config, mapping)
    if args.evaluate:
        scorer = Scorer(config, set_up_mindspore(config))
        (checkpoint,) = scorer.checkpoints(args.evaluate)
        scorer.load(checkpoint)
        keep(scorer.network)
    else:
        train(TrainingPlan(config, records, "text_generation", held_out=held_out))


if __name__ == "__main__":
    main()
