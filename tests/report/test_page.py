"""The report: its figures are those of the evaluation, it needs nothing beside itself, and no name is markup in it."""

import dataclasses
import html
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import maxmap
from maxmap import checkpoint, evaluate
from maxmap.__main__ import main
from maxmap.data.preprocessing import cropped
from maxmap.pictures import overlay
from maxmap.predictions import Predictions
from maxmap.report.evidence import gather
from maxmap.report.page import draw
from tests.zoo import quick

pytestmark = pytest.mark.usefixtures("quick_compilation")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page shows and names; elements that are not closed in order are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.texts, self.tags, self.sources, self._open = [], set(), set(), []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources |= {value for key, value in attributes if key in ("src", "href", "xlink:href")}
        assert not any(key.startswith("on") for key, _ in attributes)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def assert_stands_alone(self):
        assert not self.tags & {"script", "link", "iframe", "i"}
        assert all(source.startswith(("data:image/", "#")) for source in self.sources)


@pytest.fixture(scope="module")
def reported(odd_run, tmp_path_factory):
    """A copy of the run, its page, what was gathered for it, and what the command printed."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(odd_run.folder, folder)
    evidence = gather(folder, shown=4)
    return SimpleNamespace(folder=folder, evidence=evidence, page=draw(evidence), photos=odd_run.photos)


def test_the_evidence_is_that_of_the_evaluation(reported):
    """Probabilities of the network by hand, the images as it sees them, and Grad-CAM of the class that it names."""
    found = reported.evidence
    model, variables, info = maxmap.load(reported.folder)
    paths = sorted(reported.photos.glob("val/*/*"))
    images = maxmap.preprocess(paths, info)
    outputs = quick(model.apply, variables, images)
    probabilities = np.asarray(jax.nn.softmax(maxmap.average(outputs)))
    labels = [info["classes"].index(path.parent.name) for path in paths]
    said = found.predictions
    assert said.label.tolist() == labels and said.name == tuple(map(maxmap.errors.printable, map(str, paths)))
    assert said.best.tolist() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(said.probability, probabilities.max(1), rtol=1e-4)
    np.testing.assert_allclose(said.label_probability, probabilities[range(12), labels], rtol=1e-4)
    assert np.array_equal(said.branch, outputs["logits"].argmax(-1))
    assert found.result["top1"] == pytest.approx(100 * np.mean(said.best == labels))
    assert found.missing == {} and 0 < found.result["top1"] < 100

    of_label = np.where(said.best == labels, 1, said.label_probability)
    assert [seen.position for seen in found.wrong] == np.argsort(of_label)[:4].tolist()
    assert [seen.position for seen in found.uncertain] == np.argsort(said.probability)[:4].tolist()
    positions = [seen.position for seen in found.wrong]
    explained = maxmap.explain(model, variables, images[positions], said.best[positions])
    for seen, saliency in zip(found.wrong, explained.saliency, strict=True):
        assert np.array_equal(seen.pixels, cropped(paths[seen.position], info["preprocessing"]))
        assert np.abs(seen.heat.astype(int) - overlay(seen.pixels, saliency)).max() <= 1


def test_the_page_stands_alone_and_no_name_is_markup(reported):
    page = Page(reported.page)
    page.assert_stands_alone()
    shown = "\n".join(page.texts)
    for name in ('<b>&"', "naïve", "two\\nlines", "/<i>"):
        assert name in shown
    assert reported.page.count("<img ") == 4 * 2 + 4 and reported.page.count("<svg") == 4
    assert "i" not in page.tags and "120 images/s" in shown and "25.00\N{NO-BREAK SPACE}%" in shown
    figures = reported.evidence.result
    assert f"{figures['top1']:.2f}\N{NO-BREAK SPACE}%" in shown
    # What the recipe sets is there with the default, and what it leaves alone is not.
    recipe = re.search(r"<h2>Recipe</h2>(.*?)<h2>", reported.page, re.DOTALL)[1]
    assert "<td>config.ema_decay</td><td>0.75</td><td>None</td>" in recipe
    assert "<td>config.batch_size</td><td>8</td><td></td>" in recipe and "config.data.draft" not in recipe


def test_the_code_on_the_page_works(reported, tmp_path, monkeypatch, capsys):
    code = html.unescape(re.search(r"<pre><code>(.*?)</code></pre>", reported.page, re.DOTALL)[1])
    shutil.copy(min(reported.photos.glob("val/*/*")), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "report.html", "exec"), {})
    found = reported.evidence
    assert capsys.readouterr().out == f"{found.info['classes'][found.predictions.best[0]]}\n"


def test_an_evaluation_counts_while_it_is_of_this_checkpoint(reported, monkeypatch, capsys):
    """It is read again as it is; it is made anew where a figure, an image, the step or the preprocessing is another."""
    folder, calls = reported.folder, []
    before = {name: (folder / name).read_text() for name in ("eval.json", "predictions.csv")}

    def run(recipe, workdir):
        calls.append(workdir)
        for name, text in before.items():
            (folder / name).write_text(text)

    monkeypatch.setattr(evaluate, "run", run)
    result, table = json.loads(before["eval.json"]), before["predictions.csv"]
    spoiled = {
        "eval.json": [
            json.dumps(result | change)
            for change in ({"step": 5}, {"crop_pct": 0.5}, {"flip": True}, {"crops": True}, {"loss": 9})
        ],
        "predictions.csv": [
            table.replace("/val/", "/other/"),
            table[:-90],
            table.replace("label_probability", "x"),
            "",
        ],
    }
    spoiled["eval.json"] += ["{", "[]"]
    assert gather(folder, shown=0).predictions.name == reported.evidence.predictions.name and not calls
    for name, texts in spoiled.items():
        for number, text in enumerate(texts, 1):
            (folder / name).write_text(text)
            assert gather(folder, shown=0).result == result and len(calls) == number, (name, text[:99])
        calls.clear()


def test_what_is_missing_has_a_sentence(odd_run, reported, tmp_path, capsys):
    """Without the data the last evaluation still counts; without a recipe, a log and images little is left."""
    lost = tmp_path / "lost"
    shutil.copytree(reported.folder, lost)
    odd_run.photos.rename(tmp_path / "gone")
    try:
        assert main(["report", str(lost), f"--out={tmp_path}/a.html"]) == 0
    finally:
        (tmp_path / "gone").rename(odd_run.photos)
    told = capsys.readouterr().out.splitlines()
    assert re.match(r"missing: Give labelled images .* maxmap report CHECKPOINT IMAGES; those", told[0])
    assert str(odd_run.photos) in told[0] and told[1:] == [f"{tmp_path}/a.html"]
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<img " not in page and "Calibration" in page

    variables, info = checkpoint.read_variables(reported.folder)
    bare = {key: info[key] for key in ("model", "classes", "preprocessing", "weights", "step")}
    checkpoint.write_variables(tmp_path / "bare", variables, bare)
    assert main(["report", str(tmp_path / "bare")]) == 0
    *told, written = capsys.readouterr().out.splitlines()
    assert len(told) == 3 and written == f"{tmp_path}/bare/report.html"
    page = (tmp_path / "bare" / "report.html").read_text("utf-8")
    assert all(html.escape(line.removeprefix("missing: ")) in page for line in told)
    assert re.findall("<h2>(.*)</h2>", page) == ["Training", "Recipe", "Use it"]
    # Labelled images behind it bring the rest.
    assert main(["report", str(tmp_path / "bare"), str(odd_run.photos), "--no-explain", "--shown=1"]) == 0
    page = (tmp_path / "bare" / "report.html").read_text("utf-8")
    assert "Calibration" in page and page.count("<img ") == 2
    assert main(["report", str(tmp_path / "bare"), str(tmp_path / "none")]) == 2
    assert main(["report", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("classes", [3, 20, 21, 1000])
def test_any_number_of_classes(reported, classes):
    """A matrix up to 20 classes, pairs beyond; every class has a row; a network that diverged has a page."""
    rng, names = np.random.default_rng(0), [f"class {k}" for k in range(classes)]
    label, best = rng.integers(0, classes, (2, 60))
    said = Predictions(
        *(np.arange(60), ("a.png",) * 60, label, np.where(label == best, 1, 2), best),
        *(np.full(60, np.nan), np.full(60, np.nan), best[None]),
    )
    info = {**reported.evidence.info, "classes": names}
    text = draw(dataclasses.replace(reported.evidence, info=info, predictions=said, wrong=(), uncertain=(), log=()))
    Page(text).assert_stands_alone()
    assert (text.count("is \\ named"), text.count("taken for<")) == ((1, 0) if classes <= 20 else (0, 1))
    assert len(re.findall(r"<td>class \d+</td><td>\d+</td><td>", text)) >= classes and "nan" not in text
