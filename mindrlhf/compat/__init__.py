"""Every difference between devices, and between releases of MindSpore and MindFormers; nothing else knows of any.

`model` has what the network and its compilation need, `trainer` what a configuration and a training run need, `records`
what MindRecord's writer is spared, `logs` what a terminal is spared. Each entry says what differs, since which release,
and what happens without it. Which release is there is asked by its features, never by a version number; `installed` has
the one rule that is asked before there is a release to ask.
"""
