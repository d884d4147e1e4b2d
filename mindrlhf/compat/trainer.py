"""Differences that training meets, and MindFormers' Trainer where it has no door. Tests: tests/test_compat.py."""
from typing import Callable

import mindspore as ms
from mindspore import nn

__all__ = ["use_checkpoint", "use_strict_loading"]


def use_strict_loading(load: Callable) -> None:
    """Let MindFormers' Trainer load a network's checkpoint through `load`.

    MindFormers 1.3 passes whatever it read to `load_param_into_net` and logs what did not fit: a checkpoint none of
    whose names match loads nothing, and training goes on from random weights.

    Args:
        load: called with the network and name -> Parameter; raises when they do not fit
    """
    from mindformers.trainer import utils

    def load_param_into_net(network, parameters):
        if isinstance(network, nn.Optimizer):
            return ms.load_param_into_net(network, parameters)
        load(network, parameters)
        return [], []

    utils.load_param_into_net = load_param_into_net


def use_checkpoint(path: str) -> None:
    """Let MindFormers' Trainer load this file of its rank's folder, to start from or to resume.

    MindFormers 1.3 takes the newest one by time, which a copy of the folder changes, or, to resume, the one that
    meta.json names, damaged or not.
    """
    from mindformers.trainer import utils
    utils.get_last_checkpoint = lambda folder: path
