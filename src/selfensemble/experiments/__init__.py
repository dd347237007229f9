"""The experiments of the method's paper and past it: train or reuse, measure, store, show."""

from ..report.page import Page
from .reproduce import EXPERIMENTS, Reproduction, render_all, results_folder

__all__ = ["EXPERIMENTS", "Page", "Reproduction", "render_all", "results_folder"]
