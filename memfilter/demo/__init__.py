"""The demo: samples with planted truth, a small model that has memorized some of them, and the main job on both."""

from .table import run

__all__ = ["run"]
