"""The report: one page that needs nothing else, for any runs, with nothing taken from them as HTML."""

import base64
import functools
import io
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from selfensemble.evaluation.certified import CERTIFIED, Certified, Point, read_certified
from selfensemble.evaluation.results import (
    RESULTS,
    CheckRecord,
    DataRecord,
    Entry,
    ModelRecord,
    Results,
    read_results,
)
from selfensemble.report.gallery import GALLERY
from selfensemble.report.html import write_report
from selfensemble.report.shown import between
from selfensemble.report.svg import Plot
from selfensemble.report.verdict import verdicts
from selfensemble.runtime.files import write_json
from selfensemble.runtime.provenance import binomial_interval

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.mistakes: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def entry(key: str, correct: int, images: int = 50, **changes: Any) -> Entry:
    low, high = binomial_interval(correct, images)
    accuracy = correct / images
    values: dict[str, Any] = {
        "key": key,
        "title": key.partition("-")[0].upper(),
        "attack": key.partition("-")[0],
        "images": images,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "seeds": (accuracy, accuracy, max(0.0, accuracy - 0.02)),
        "all_seeds": max(0.0, accuracy - 0.04),
        "wrong_per_query": 1 - accuracy,
        "persistent": {k: 1 - accuracy ** (1 + np.log10(k)) for k in (1, 2, 5, 10, 20, 50, 100)},
        "rms_l2": 0.4,
        "median_l2": 0.3,
        "mean_linf": 0.02,
        "max_linf": 0.03,
        "gradients": 2000,
        "forwards": 2040,
    }
    return Entry(**(values | changes))


def honest(shift: int = 0) -> dict[str, Any]:
    """Attacks at several radii in two norms, and at minimum distance."""
    attacks, worst = [], []
    for norm, radii in (("linf", (2 / 255, 4 / 255, 8 / 255)), ("l2", (0.25, 0.5))):
        for i, eps in enumerate(radii):
            threat: dict[str, Any] = {"norm": norm, "eps": eps}
            for j, name in enumerate(("pgd", "apgd", "transfer")):
                correct = 40 - 10 * i - 3 * j * (1 if j < 2 else -1) - shift
                settings = {"eps": eps, "steps": 100}
                attacks.append(entry(f"{name}-{norm}-{i}", correct, settings=settings, **threat))
            title: dict[str, Any] = {"title": "worst case", "attack": "worst case"}
            worst.append(entry(f"worst-{norm}-{i}", 35 - 10 * i - shift, **title, **threat))
    attacks.append(entry("ddn-min", 1, norm="l2", rms_l2=0.8))
    return {
        "protocol": {"name": "honest", "attacks": ["pgd", "apgd"]},
        "attacks": attacks,
        "worst_case": worst,
    }


def paper(shift: int = 0) -> dict[str, Any]:
    """The C&W attack at several fixed strengths."""
    attacks = [
        entry(f"cw-{i}", 42 - 9 * i - shift, title="C&W", c=c, rms_l2=0.2 * (i + 1))
        for i, c in enumerate((0.01, 0.1, 1.0, 10.0))
    ]
    return {"protocol": {"name": "paper"}, "attacks": attacks, "worst_case": ()}


def a_run(
    folder: Path,
    *,
    channels: int | None = 3,
    classes: tuple[str, ...] = ("cat", "dog", "owl"),
    draws: int = 10,
    digest: str = "0123abcd",
    size: int = 16,
    **changes: Any,
) -> Path:
    """Write a run; no gallery where `channels` is None."""
    values: dict[str, Any] = {
        "name": folder.name,
        "model": ModelRecord(
            name="small-vgg", digest=digest, draws=draws, noise={"init_std": 0.2, "inner_std": 0.1}
        ),
        "data": DataRecord(source="cifar10:test", images=50, classes=classes, digest="feed"),
        "clean": entry("clean", 45, title="No attack", attack="none", rms_l2=0.0, gradients=0, forwards=0),
        "provenance": {"versions": {"torch": "2.8.0"}, "hardware": {"cpu": "an example"}},
    } | honest()
    results = Results(**(values | changes))
    folder.mkdir(parents=True)
    write_json(folder / RESULTS, results.model_dump(mode="json"))
    if channels is not None:
        save_file(pictures(results, channels, size), folder / GALLERY)
    return folder


def pictures(results: Results, channels: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    wave = torch.linspace(0, 6, size).sin()
    original = (0.5 + 0.4 * wave.outer(wave).expand(10, channels, size, size)).contiguous()
    label = torch.arange(10) % 3
    tensors = {"original": original, "label": label, "answer.clean": label.clone()}
    for each in results.attacks:
        change = 8 / 255 * torch.randn(original.shape, generator=generator).sign()
        tensors[each.key] = (original + change).clamp(0, 1)
        tensors[f"answer.{each.key}"] = (label + 1) % 4  # the last class has no name
    return tensors


def report(*runs: Path) -> tuple[str, Page]:
    text = write_report(runs, runs[0].parent / "report.html").read_text()
    return text, Page(text)


@pytest.fixture(scope="module", autouse=True)
def _drawn_once() -> Iterator[None]:
    """A plot that several reports hold alike is drawn for the first of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plot, "svg", functools.cache(Plot.svg))
        yield


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    folder = tmp_path_factory.mktemp("runs")
    return report(a_run(folder / "first"), a_run(folder / "second", digest="beef", **honest(3)))


def test_one_file_that_asks_the_network_for_nothing(two_runs: tuple[str, Page]) -> None:
    text, page = two_runs
    for name, attributes in page.tags:
        assert name not in {"link", "script", "iframe", "object", "base"}
        for reference in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert (attributes.get(reference) or "#").startswith(("#", "data:image/png;base64,"))
        assert not [attribute for attribute in attributes if attribute.startswith("on")]
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_well_formed(two_runs: tuple[str, Page]) -> None:
    text, page = two_runs
    assert text.startswith("<!doctype html>")
    assert page.mistakes == []
    assert page.open == []


def test_ids_are_unique_and_references_lead_somewhere(two_runs: tuple[str, Page]) -> None:
    text, page = two_runs
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    references += [
        (name, "") for names in re.findall(r'labelledby="([^"]+)"', text) for name in names.split()
    ]
    assert references
    assert {one or other for one, other in references} <= set(ids)


def test_figures_have_text_alternatives(two_runs: tuple[str, Page]) -> None:
    text, page = two_runs
    for attributes in page.attributes("svg"):
        assert attributes.get("aria-hidden") == "true" or (
            attributes["role"] == "img" and attributes["aria-labelledby"]
        )
    assert page.attributes("img")
    assert all(attributes["alt"] for attributes in page.attributes("img"))
    drawn = [attributes for attributes in page.attributes("svg") if attributes.get("role") == "img"]
    assert len(drawn) == len(page.attributes("desc")) == text.count("The data of this plot")


def test_figures_and_intervals_appear(two_runs: tuple[str, Page]) -> None:
    _, page = two_runs
    low, high = binomial_interval(45, 50)
    assert f"90.0 [{100 * low:.1f}, {100 * high:.1f}]" in page.text
    for expected in (
        "L∞, ε = 8/255", "L2, ε = 0.25", "Minimum distance, L2", "a stronger attack may exist",
        "Accuracy against the radius, L∞", "Accuracy against the radius, L2", "Accuracy against distortion",
        "The persistent attacker", "second, worst case (L2, ε = 0.25)",
        "first, worst case", "second, worst case", "True: cat",
        "Under attack: dog", "class 3", "magnified 10 times", "an example", "feed", "beef", "2000",
    ):  # fmt: skip
        assert expected in page.text
    assert "Accuracy against the strength c" not in page.text
    assert "number of draws" not in page.text


def test_names_of_users_are_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>$x$ id="figure_1" #010203 "\'&'
    run = a_run(tmp_path / "run", name=evil, classes=(evil, evil, evil), protocol={"name": evil})
    text, page = report(run)
    assert "<script" not in text
    assert page.mistakes == []
    assert not page.attributes("script")
    assert evil in page.text
    assert any(evil in (attributes["alt"] or "") for attributes in page.attributes("img"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_names_that_no_font_of_the_plots_holds(tmp_path: Path) -> None:
    _, page = report(a_run(tmp_path / "a", name="試験"), a_run(tmp_path / "b", name="_hidden"))
    assert "試験, worst case" in page.text
    assert "_hidden, worst case" in page.text


def a_certification(folder: Path, digest: str, source: str) -> Path:
    points = tuple(
        Point(radius=0.05 * step, accuracy=0.8 - 0.1 * step, low=0.7 - 0.1 * step, high=0.85 - 0.1 * step)
        for step in range(6)
    )
    found = Certified(
        name=folder.name,
        model=ModelRecord(name="small-vgg", digest=digest, draws=10, noise={"conv": 0.2}),
        data=DataRecord(source=source, images=200, classes=("cat", "dog", "owl"), digest="feed"),
        settings={"method": "vote", "alpha": 0.001, "n": 10_000},
        precision="bf16", std=0.2, curve=points, abstained=0.02, mean_radius=0.137, draws=10_100,
        provenance={"versions": {"torch": "2.8.0"}, "hardware": {"cpu": "an example"}},
    )  # fmt: skip
    folder.mkdir(parents=True)
    write_json(folder / CERTIFIED, found.model_dump(mode="json"))
    return folder


def test_a_network_lies_between_its_certificates_and_what_attacks_leave(tmp_path: Path) -> None:
    """Between two radii of the curve the certified share is that of the larger; of attacks the worst."""
    results = read_results(a_run(tmp_path / "run"))
    certified = read_certified(a_certification(tmp_path / "mine", results.model.digest, "cifar10:test"))
    attacks = tuple(
        results.clean.model_copy(update={"norm": "l2", "eps": eps, "accuracy": accuracy})
        for eps, accuracy in ((0.12, 0.6), (0.12, 0.55), (0.2, 0.5), (0.9, 0.1))
    )
    found = between(certified, {"run": results.model_copy(update={"attacks": (), "worst_case": attacks})})
    rows = [
        (row.radius, row.certified and round(row.certified.radius, 2), row.attacked.accuracy)
        for row in found["run"]
    ]
    assert rows == [(0.12, 0.15, 0.55), (0.2, 0.2, 0.5), (0.9, None, 0.1)]
    other = results.model_copy(update={"model": results.model.model_copy(update={"digest": "beef"})})
    assert between(certified, {"run": other}) == {}


def test_radii_of_inputs_in_other_bounds_are_not_called_shares_of_255(tmp_path: Path) -> None:
    """40/255 of inputs in [-1, 1] is half as far as of images in [0, 1]."""
    results = read_results(a_run(tmp_path / "one"))
    model = results.model.model_copy(update={"behaviour": {"bounds": [-1.0, 1.0]}})
    write_json(tmp_path / "one" / RESULTS, results.model_copy(update={"model": model}).record())
    text, page = report(tmp_path / "one")
    assert page.mistakes == []
    assert "of inputs in [-1, 1]" in text
    assert "inputs in [-1, 1]. Seeds" in " ".join(text.split())
    assert not re.search(r"= \d+/255|in 1/255", text)


@pytest.mark.parametrize("what", ["data", "draws", "precision", "behaviour"])
def test_what_answers_otherwise_or_on_other_images_stands_apart(tmp_path: Path, what: str) -> None:
    """The weights are the same; figures of both are never one line, nor between one certificate."""
    results = read_results(a_run(tmp_path / "one"))
    different: dict[str, dict[str, Any]] = {
        "data": {"data": results.data.model_copy(update={"digest": "bead"})},
        "draws": {"model": results.model.model_copy(update={"draws": 1})},
        "precision": {"model": results.model.model_copy(update={"precision": "bf16"})},
        "behaviour": {"model": results.model.model_copy(update={"behaviour": {"sampling": "per_image"}})},
    }
    if what == "behaviour":
        results = results.model_copy(update={"model": results.model.model_copy(update={"behaviour": {}})})
        write_json(tmp_path / "one" / RESULTS, results.record())
    runs = {"one": results, "other": results.model_copy(update=different[what])}
    folder = tmp_path / "other"
    folder.mkdir()
    write_json(folder / RESULTS, runs["other"].record())
    assert read_results(folder) == runs["other"]
    mine = a_certification(tmp_path / "mine", results.model.digest, "cifar10:test")
    certificate = read_certified(mine)
    found = verdicts(runs, {"mine": certificate})
    assert [verdict.labels for verdict in found] == [["one", "mine"], ["other"]]
    certificate = certificate.model_copy(update={"data": results.data, "model": results.model})
    expected = {"one"} if what in ("data", "behaviour") else {"one", "other"}
    assert set(between(certificate, runs)) == expected
    _, page = report(tmp_path / "one", folder, mine)
    assert page.mistakes == []


def test_at_most_is_the_worst_case_that_was_judged_again(tmp_path: Path) -> None:
    """The least of several attacks is low by chance."""
    results = read_results(a_run(tmp_path / "one"))
    lucky = entry("pgd-lucky", 1, norm="l2", eps=0.25)
    results = results.model_copy(update={"attacks": (*results.attacks, lucky)})
    certified = read_certified(a_certification(tmp_path / "mine", results.model.digest, "cifar10:test"))
    (rows,) = between(certified, {"one": results}).values()
    worst = {each.eps: each.accuracy for each in results.worst_case if each.norm == "l2"}
    assert {row.radius: row.attacked.accuracy for row in rows} == worst


def test_certificates_stand_beside_attacks_and_published_curves(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    mine = a_certification(tmp_path / "mine", "0123abcd", "cifar10:test")
    _, page = report(run, mine)
    assert page.mistakes == []
    for expected in ("mine, certified by vote", "run, under attack", "Cohen et al., std 0.25", "0.137"):
        assert expected in page.text, expected
    assert "between certificate and attack" in page.text
    _, alone = report(a_certification(tmp_path / "other", "beef", "digits:test"))
    assert alone.mistakes == []
    assert "between certificate and attack" not in alone.text
    assert "other, certified by vote" in alone.text
    assert "Cohen" not in alone.text
    assert ("Dashed" in page.text, "Dashed" in alone.text) == (True, False)
    with pytest.raises(ValueError, match="twice"):
        report(mine, mine / CERTIFIED)
    (mine / CERTIFIED).write_text("{}")
    with pytest.raises(ValueError, match=r"certified\.json"):
        report(mine)


def test_protocols_are_never_mixed(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / "alpha"),
        a_run(tmp_path / "beta", **paper()),
        a_run(tmp_path / "gamma", **paper(4)),
    ]
    text, page = report(*runs)
    sections = re.findall(r'<section aria-labelledby="protocol-\d+">(.*?)</section>', text, re.DOTALL)
    assert len(sections) == 2
    first, second = (Page(section).text for section in sections)
    assert "Protocol honest" in first
    assert "beta" not in first
    assert "C&W, c = 0.1" not in first
    assert "Protocol paper" in second
    assert "alpha" not in second
    assert "Accuracy against the strength c" in second
    assert "beta, C&W" in second
    assert "gamma, C&W" in second
    assert "Accuracy against the radius" not in second
    assert page.mistakes == []


def test_rows_are_shared_and_what_a_run_lacks_is_a_dash(tmp_path: Path) -> None:
    more = paper()
    more["attacks"] = more["attacks"][:2]
    text, _ = report(a_run(tmp_path / "one", **paper()), a_run(tmp_path / "two", **more))
    table = re.findall(r"<table>.*?</table>", text, re.DOTALL)[1]
    row = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    assert sum("C&amp;W, c = 0.01" in each for each in row) == 1
    assert next(each for each in row if "C&amp;W, c = 0.01" in each).count("\N{EN DASH}") == 0
    assert next(each for each in row if "C&amp;W, c = 10" in each).count("\N{EN DASH}") == 3


def test_what_makes_a_comparison_doubtful_is_said(tmp_path: Path) -> None:
    other = DataRecord(source="cifar10:test", images=50, classes=("a",), digest="other")
    changed = {"protocol": {"name": "honest", "attacks": ["fgsm"]}, "data": other}
    _, page = report(a_run(tmp_path / "one"), a_run(tmp_path / "two", **(honest() | changed)))
    assert "different settings: attacks." in page.text
    assert "judged on different images" in page.text


def test_draws_of_one_network_become_a_plot(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / f"draws{n}", draws=n, **honest(10 - n)) for n in (1, 10)]
    _, page = report(*runs)
    assert "Accuracy against the number of draws" in page.text
    other = ModelRecord(name="small-vgg", digest="other", draws=10, noise={"init_std": 0.5})
    runs[1] = a_run(tmp_path / "other", model=other)
    assert "Accuracy against the number of draws" not in report(*runs)[1].text


def test_attacks_of_one_strength_are_lines_of_their_own(tmp_path: Path) -> None:
    attacks = [
        entry(f"pgd-{eot}-{eps}", 30, norm="l2", eps=eps, settings={"eot": eot, "eps": eps, "step": eps / 4})
        for eot in (1, 20)
        for eps in (0.25, 0.5)
    ]
    _, page = report(a_run(tmp_path / "run", attacks=attacks, worst_case=()))
    assert "PGD (eot=1)" in page.text
    assert "PGD (eot=20)" in page.text
    assert "step=" not in page.text.partition("Honesty checks")[0]


def test_checks_in_words_and_symbols(tmp_path: Path) -> None:
    checks = [
        CheckRecord(name="more steps", passed=True, figure="40 % to 40 %", advice=""),
        CheckRecord(name="random noise", passed=False, figure="30 %", advice="use a stronger attack"),
        CheckRecord(name="frozen noise", passed=None, figure="", advice="the model has no noise"),
    ]
    _, page = report(a_run(tmp_path / "checked", checks=checks), a_run(tmp_path / "unchecked"))
    for expected in ("✓ passed", "✗ failed", "\N{EN DASH} not applicable", "use a stronger attack"):
        assert expected in page.text
    assert page.text.count("selfensemble doctor MODEL") == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures(tmp_path: Path, channels: int) -> None:
    text, page = report(a_run(tmp_path / "run", channels=channels))
    assert len(page.attributes("img")) == 6 * 8 * 3
    assert "Attacks left out: 10." in page.text
    assert re.findall(r"<summary>(\S+ \(.*?\)):", text) == [
        "APGD (L∞, ε = 2/255)", "APGD (L∞, ε = 4/255)", "APGD (L∞, ε = 8/255)", "APGD (L2, ε = 0.25)",
        "APGD (L2, ε = 0.5)", "DDN (Minimum distance, L2)",
    ]  # fmt: skip
    first = re.findall(r'src="data:image/png;base64,([^"]+)"', text)[0]
    with Image.open(io.BytesIO(base64.b64decode(first))) as image:
        assert (image.size, image.mode) == ((16, 16), "L" if channels == 1 else "RGB")


def test_few_pictures_of_large_images(tmp_path: Path) -> None:
    _, page = report(a_run(tmp_path / "run", channels=1, size=250, **paper()))
    assert len(page.attributes("img")) == 4 * 3 * 3


def test_channels_that_are_no_colours(tmp_path: Path) -> None:
    _, page = report(a_run(tmp_path / "run", channels=4))
    assert "images of 4 channels can not be shown" in page.text


def test_missing_gallery(tmp_path: Path) -> None:
    _, page = report(a_run(tmp_path / "run", channels=None))
    assert f"the run has no {GALLERY}" in page.text
    assert page.attributes("img") == []


def test_damaged_gallery(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", **paper())
    whole = (run / GALLERY).read_bytes()
    tensors = pictures(Results.model_validate_json((run / RESULTS).read_text()), 3, 16)

    def refused(match: str, **changes: Tensor) -> None:
        save_file(tensors | changes, run / GALLERY)
        with pytest.raises(ValueError, match=match):
            write_report([run], tmp_path / "out.html")

    refused("'original' is float64", original=tensors["original"].double())
    refused("'cw-0' is float32", **{"cw-0": tensors["cw-0"][:, :1].contiguous()})
    refused("not finite", **{"cw-1": tensors["cw-1"] * torch.nan})
    refused("'label' is int64", label=torch.zeros(4, dtype=torch.int64))
    del tensors["answer.cw-2"]
    refused(r"holds no 'answer\.cw-2'")
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        (run / GALLERY).write_bytes(content)
        with pytest.raises(ValueError, match=r"gallery.safetensors is damaged"):
            write_report([run], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "b", **paper())]
    first = write_report(runs, tmp_path / "one.html")
    assert first == tmp_path / "one.html"
    cached: Any = Plot.svg
    cached.cache_clear()  # all is drawn again
    assert first.read_bytes() == write_report(runs, tmp_path / "new" / "two.html").read_bytes()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / where, name="rse") for where in ("x/same", "y/same", "z/other")]
    _, page = report(*runs)
    for expected in ("rse (x/same)", "rse (y/same)"):
        assert expected in page.text
    _, page = report(runs[0], runs[2])
    assert "rse (same), worst case" in page.text
    assert "rse (other), worst case" in page.text


def test_bad_input(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no runs"):
        write_report([], tmp_path / "out.html")
    with pytest.raises(FileNotFoundError, match=r"no results\.json"):
        write_report([tmp_path], tmp_path / "out.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report([run], tmp_path)
    with pytest.raises(ValueError, match="given twice"):
        write_report([run, run / RESULTS], tmp_path / "out.html")
    with pytest.raises(ValueError, match="do not name their protocol"):
        write_report([a_run(tmp_path / "unnamed", protocol={"steps": 3})], tmp_path / "out.html")
    (run / RESULTS).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        write_report([run], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_renders_it(tmp_path: Path) -> None:
    page = write_report(
        [a_run(tmp_path / "run"), a_run(tmp_path / "paper", **paper())], tmp_path / "out.html"
    )
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        "--window-size=500,2500",
    ]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=60)
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    colourful = (pixels.max(axis=2) - pixels.min(axis=2) > 100).sum()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert colourful > 500  # lines of a plot


def test_the_verdict_comes_first(tmp_path: Path) -> None:
    """What holds, at which radius, against what, how sure; a network once, whatever it was evaluated by."""
    failed = [CheckRecord(name="random noise", passed=False, figure="30 %", advice="attack better")]
    passed = [CheckRecord(name="more steps", passed=True, figure="1 %", advice="")]
    far = entry("worst-far", 0, title="worst case", attack="worst case", norm="linf", eps=16 / 255)
    harsh = honest(14)
    harsh["worst_case"].append(far)
    runs = [
        a_run(tmp_path / "weak", **paper()),
        a_run(tmp_path / "fair", checks=failed, **honest()),
        a_certification(tmp_path / "mine", "0123abcd", "cifar10:test"),
        a_run(tmp_path / "other", digest="beef", checks=passed, **harsh),
        a_run(tmp_path / "unknown", digest="cafe", **paper()),
    ]
    text, _ = report(*runs)
    found = re.search(r'<section aria-labelledby="verdict">(.*?)</section>', text, re.DOTALL)
    assert found
    assert "<table" not in text[: found.end()]
    one, other, unknown = (Page(part).text for part in found.group(1).split("<h3>")[1:])
    low, high = (f"{100 * end:.1f}" for end in binomial_interval(15, 50))
    for expected in (
        "weak, fair, mine", "Without attack 90.0 % of 50 images", "within L∞, at most",
        f"8/255: 30.0 % [{low}, {high}] (3 attacks)", "0.25: 70.0 %", "DDN moves each image as far as needed",
        "at least", "0.1: 60.0 % [50.0, 65.0]", "wrong with probability 0.001 at most",
        "weak is left out here", "not sure. Honesty checks failed (random noise)",
    ):  # fmt: skip
        assert expected in one, expected
    assert "16/255: 0.0 % [0.0, 7.1] (0 attacks, nothing holds)" in other
    assert "all 1 honesty checks that apply passed" in other
    assert "Nothing is known of its robustness" in unknown
    assert "No honesty check was made" in unknown


def test_the_honest_protocol_stands_before_the_weak_one(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "weak", **paper()), a_run(tmp_path / "fair")]
    for order in (runs, runs[::-1]):
        text, page = report(*order)
        assert text.index(">Protocol honest</h2>") < text.index(">Protocol paper</h2>")
        assert page.text.count("A weak protocol:") == 1
        assert text.index(">Protocol paper</h2>") < text.index("A weak protocol:")


def test_the_checks_of_a_network_are_shown_once(tmp_path: Path) -> None:
    checks = [CheckRecord(name="more steps", passed=True, figure="40 % to 41 %", advice="")]
    runs = [
        a_run(tmp_path / "weak", checks=checks, **paper()),
        a_run(tmp_path / "fair", checks=checks),
        a_run(tmp_path / "bare", **paper(1)),
        a_run(tmp_path / "other", digest="beef", checks=checks),
    ]
    _, page = report(*runs)
    assert page.text.count("40 % to 41 %") == 2
    assert "They were not run with bare" in page.text


def test_no_figure_is_minus_zero(tmp_path: Path) -> None:
    """Differences and intervals come out a little below nothing."""
    tiny = -1e-17
    clean = entry("clean", 45, attack="none", low=tiny, seeds=(tiny,), all_seeds=tiny, wrong_per_query=tiny,
                  rms_l2=-0.0, persistent={1: tiny, 10: 0.5})  # fmt: skip
    text, _ = report(a_run(tmp_path / "run", clean=clean))
    assert not re.search(r"(?<![\w.])-0(\.0*)?(?![\w.])", Page(text).text)


def test_tables_fit_a_phone(two_runs: tuple[str, Page]) -> None:
    """Summaries network by network, other tables a cell a line, each cell with the name of its column."""
    text, page = two_runs
    regions = [each for each in page.attributes("div") if "table" in (each.get("class") or "").split()]
    assert regions
    for each in regions:
        kinds = set((each["class"] or "").split())
        assert kinds & {"stack", "one", "many"}, each
        assert ("many" in kinds) == (each["aria-label"] or "").startswith("Summary of protocol")
    for stacked in re.findall(r'<div class="table[^"]*stack.*?</table>', text, re.DOTALL):
        cells = re.findall(r"<td([^>]*)>(.)", stacked)
        assert all("data-label" in cell or 'class="left"' in cell for cell, _ in cells)
    for label in ("first", "second"):
        one = re.search(rf'aria-label="Summary of {label}, protocol honest".*?</table>', text, re.DOTALL)
        assert one
        assert one.group().count('<th scope="col"') == 4
        assert one.group().count("worst case") == 5


def test_a_plot_answers_one_question(tmp_path: Path) -> None:
    """What is left at a radius is a line a network; single attacks stand in the table."""
    text, _ = report(a_run(tmp_path / "a"), a_run(tmp_path / "b", digest="beef"))
    legends = {
        title: re.findall(r"<span>(.*?)</span></li>", legend)
        for title, legend in re.findall(
            r'<figure>\n<h3>(.*?)</h3>.*?<ul class="legend">(.*?)</ul>', text, re.DOTALL
        )
    }
    assert legends["Accuracy against the radius, L∞"] == ["a, worst case", "b, worst case"]
    assert len(legends["The persistent attacker, L2"]) == 2 * (1 + 2)
    assert not any("L∞" in label for label in legends["The persistent attacker, L2"])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_no_page_of_the_print_is_empty(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "run", size=120), a_run(tmp_path / "paper", digest="beef", **paper())]
    page = write_report(runs, tmp_path / "out.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}"]
    command += [f"--print-to-pdf={tmp_path / 'out.pdf'}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    content = (tmp_path / "out.pdf").read_bytes()
    objects = dict(re.findall(rb"(?<!\d)(\d+) 0 obj\s(.*?)endobj", content, re.DOTALL))
    pages = [each for each in objects.values() if re.search(rb"/Type\s*/Page\b", each)]
    assert len(pages) > 4
    for each in pages:
        found = re.search(rb"/Contents (\d+) 0 R", each)
        assert found
        drawn = zlib.decompressobj().decompress(
            objects[found.group(1)].partition(b"stream")[2].lstrip(b"\r\n")
        )
        assert len(re.findall(rb"T[jJ]", drawn)) > 100
