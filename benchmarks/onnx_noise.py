"""What noise of a seed costs in ONNX files, against that of the runtime, which repeats in every session.

    python benchmarks/onnx_noise.py [--rounds 9] [--threads N] [--out FOLDER]

Networks of the zoo; both forms of a file take turns in one process.
"""

import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import onnxruntime
import torch
from timing import Case, arguments, in_turn, medians, parsed, ratio, report, settings

import selfensemble as rse
from selfensemble.artefacts import onnx_export
from selfensemble.artefacts.onnx_noise import seed_noise
from selfensemble.artefacts.onnx_session import seed_words
from selfensemble.artefacts.storage import read_config

MODELS = (("digits-rse", 1), ("digits-rse", 64), ("cifar10-vgg16-rse", 1), ("cifar10-vgg16-rse", 16))


def main() -> None:
    options = parsed(arguments(__doc__, rounds=9))
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    rows, values = [], {}
    for name, batch in MODELS:
        shape = read_config(name).input_shape
        assert shape is not None
        images = torch.rand(batch, *shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        cases: dict[str, Case] = {}
        sizes: dict[str, int] = {}
        forms = {"runtime": lambda model: model, "seed": seed_noise}
        with tempfile.TemporaryDirectory() as folder:
            for form, change in forms.items():
                with mock.patch.object(onnx_export, "seed_noise", change):
                    path = rse.export_onnx(rse.load(name), Path(folder) / "x.onnx", images[:2], draws=10)
                sizes[form] = path.stat().st_size
                session = onnxruntime.InferenceSession(path.read_bytes(), session_options)
                feed = {"images": images.numpy()} | ({"seed": seed_words()} if form == "seed" else {})
                cases[form] = partial(session.run, None, feed)
        seconds = in_turn(cases, options.rounds)
        title = f"{name}, {batch} images"
        values[title] = {"seconds": seconds, "bytes": sizes}
        milliseconds = [f"{1e3 * each:.1f}" for each in medians(seconds).values()]
        factor, larger = ratio(seconds, "seed", "runtime"), (sizes["seed"] - sizes["runtime"]) / 1000
        rows.append([title, *milliseconds, f"{factor:.2f}", f"{larger:.0f}"])
    report(
        "onnx_noise",
        f"10 draws, onnxruntime, {options.threads} threads, medians of {options.rounds} rounds",
        ["", "noise of the runtime (ms)", "of a seed (ms)", "ratio", "kB larger"],
        rows,
        {"settings": settings(options), "cases": values},
        options.out,
    )


if __name__ == "__main__":
    main()
