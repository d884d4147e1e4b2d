"""Reward models for GLM-4 on MindSpore and MindFormers.

Importing the package is cheap: MindSpore is imported by the modules that need it, never by this one.
"""
__version__ = "0.1.0"
