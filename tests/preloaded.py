"""What the process from which commands are forked has loaded: no thread, no number, no address of a hub."""

import gc
import sys
from importlib import import_module
from pathlib import Path

for name in (
    "PIL.Image", "scipy.special", "torch._dynamo", "torch.distributed", "torch.utils.tensorboard",
    "selfensemble.artefacts.storage", "selfensemble.cli.evaluation", "selfensemble.cli.models",
    "selfensemble.cli.terminal", "selfensemble.cli.training", "selfensemble.evaluation.certified",
    "selfensemble.evaluation.runner", "selfensemble.training.trainer",
):  # fmt: skip
    import_module(name)
assert not {"huggingface_hub", "selfensemble.__main__"} & sys.modules.keys()
assert len(list(Path("/proc/self").glob("task/*"))) <= 1
gc.freeze()  # so that what is shared stays so
