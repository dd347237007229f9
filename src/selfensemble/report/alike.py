"""Which runs are of the same network and the same images, so that figures of them may stand together."""

from collections.abc import Mapping

from ..evaluation.certified import Certified
from ..evaluation.results import Results


def is_of(one: Results | Certified, other: Results | Certified) -> bool:
    """Whether both are of one network with one noise and of images of one set, whatever draws answered."""
    return one.model.is_same(other.model) and one.data.agrees(other.data)


def answering_alike(runs: Mapping[str, Results]) -> list[dict[str, Results]]:
    """Evaluations, by their labels, of which all in a group are of what answers in one way on one set."""
    groups: list[dict[str, Results]] = []
    for label, run in runs.items():
        for group in groups:
            if all(is_of(run, each) and _answers(run) == _answers(each) for each in group.values()):
                group[label] = run
                break
        else:
            groups.append({label: run})
    return groups


def _answers(run: Results) -> tuple[int, str]:
    return run.model.draws, run.model.precision
