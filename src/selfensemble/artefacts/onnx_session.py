"""ONNX files in onnxruntime, with fresh noise at every run, in every session and in every process."""

import ctypes
import hashlib
import json
import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ensemble.checks import check_count, check_images
from ..ensemble.ensemble import Prediction
from ..runtime.packages import needs
from .onnx_export import PREFIX
from .onnx_noise import SEED


def seed_words(seed: int | None = None) -> np.ndarray:
    """(4,) uint32, what a file of `export_onnx` takes as `seed`.

    Args:
        seed: any integer, for noise that repeats; None for 128 fresh bits of the operating system.
    """
    if seed is None:
        bits = os.urandom(16)
    else:
        bits = hashlib.blake2b(str(operator.index(seed)).encode(), digest_size=16).digest()
    return np.frombuffer(bits, dtype="<u4").astype(np.uint32)


class OnnxEnsemble:
    """A file of `export_onnx`, asked like an ensemble.

    Usable from several threads. A process that was forked makes a session of its own when it first predicts
    (onnxruntime's threads do not survive a fork), and so does one that it was pickled to.

    Args:
        path: the file.
        threads: that a run may use; None leaves it to onnxruntime.

    Attributes:
        draws: noise draws of an answer, part of the file.
        bounds: the valid range of inputs; None for no range.
        classes: their names, where the file has them.
        noise: standard deviation by module, of the layers that are on.

    Raises:
        FileNotFoundError, ValueError: no such file, or none that `export_onnx` of this version wrote.
        MissingPackage: onnxruntime is missing: `pip install 'selfensemble[onnx]'`.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self.threads = None if threads is None else check_count("threads", threads)
        self._digest: str | None = None
        self._sessions: dict[int, Any] = {}  # by process
        session = self._session()
        about = session.get_modelmeta().custom_metadata_map
        if f"{PREFIX}.draws" not in about:
            raise ValueError(f"{self.path} was not written by export_onnx: run it in onnxruntime itself")
        facts = {key: json.loads(about[f"{PREFIX}.{key}"]) for key in ("draws", "bounds", "classes", "noise")}
        self.draws: int = facts["draws"]
        self.bounds = None if facts["bounds"] is None else tuple(facts["bounds"])
        self.classes = None if facts["classes"] is None else tuple(facts["classes"])
        self.noise: dict[str, Any] = facts["noise"]
        self._takes_seed = SEED in [each.name for each in session.get_inputs()]
        if self.noise and not self._takes_seed:
            raise ValueError(
                f"the noise of {self.path} repeats in every new session, as an earlier version exported it: "
                "export the ensemble again"
            )

    @torch.no_grad()
    def predict(self, inputs: Tensor | np.ndarray, *, seed: int | None = None) -> Prediction:
        """Label, mean probabilities and their spread over the draws, as `SelfEnsemble.predict` has them.

        Args:
            inputs: (B, ...) images in `bounds`, a tensor or an array. All of them are one run, in the memory
                of `draws` times as many.
            seed: None for fresh noise (what a defense needs), an integer for noise that repeats with the same
                batch; it is other noise than that of the seed in `SelfEnsemble.predict`.

        Returns:
            On the device of `inputs`; the spread of a single draw is NaN.

        Raises:
            TypeError, ValueError: inputs of a wrong dtype, shape or range.
        """
        images = torch.tensor(inputs, device="cpu") if isinstance(inputs, np.ndarray) else inputs
        check_images(images, self.bounds)
        session = self._session()
        feed = {"images": self._fitting(images, session.get_inputs()[0])}
        if self._takes_seed:
            feed[SEED] = seed_words(seed)
        probabilities, *spreads = (
            torch.from_numpy(each).to(images.device) for each in session.run(None, feed)
        )
        if not spreads:
            spreads = [torch.full_like(probabilities, float("nan") if self.noise else 0.0)]
        used = torch.full((len(images),), self.draws, device=images.device)
        return Prediction(probabilities.argmax(dim=-1), probabilities, spreads[0], used)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sessions": {}}

    def _session(self) -> Any:
        """That of this process."""
        process = os.getpid()
        if process not in self._sessions:
            for inherited in self._sessions.values():
                # Freed in this process, it would wait for threads that are only its parent's.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
            self._sessions = {process: self._opened()}
        return self._sessions[process]

    def _opened(self) -> Any:
        with needs("selfensemble[onnx]"):
            import onnxruntime
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}: pass what export_onnx wrote")
        content = self.path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self._digest not in (None, digest):
            raise ValueError(f"{self.path} has changed since it was opened: make a new OnnxEnsemble of it")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads or 0
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a kind for each reason, of no common class
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"onnxruntime cannot read {self.path}: {reason}") from error
        self._digest = digest
        return session

    def _fitting(self, images: Tensor, expected: Any) -> np.ndarray:
        """`images` in the dtype of the file, if they have its shape."""
        shape = tuple(expected.shape[1:])
        if images.dim() != len(expected.shape) or any(
            isinstance(size, int) and size != mine for size, mine in zip(shape, images.shape[1:], strict=True)
        ):
            raise ValueError(
                f"{self.path} takes inputs of shape {('batch', *shape)}, got {tuple(images.shape)}"
            )
        return images.detach().cpu().numpy().astype(_DTYPES[expected.type])


_DTYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
           "tensor(int64)": np.int64, "tensor(int32)": np.int32}  # fmt: skip
